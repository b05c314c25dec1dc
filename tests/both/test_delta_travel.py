"""The delta bundle: saved, opened again, refused when it does not belong; in both frameworks and across them."""

import json

import numpy as np
import pytest

from slimkit.core.errors import FileFormatError
from tests.both.test_delta_apply import KINDS, same, snapshot, stir


def build(kit, width=8, seed=0):
    net = kit.named(
        embed=kit.linear(6, width),
        body=kit.named(query=kit.linear(width, 8), act=kit.relu(), value=kit.linear(8, 8), norm=kit.layer_norm(8)),
        head=kit.linear(8, 3),
    )
    kit.train_mode(kit.fill(net, seed), False)
    return net


@pytest.fixture
def x(kit, rng):
    return kit.tensor(rng.standard_normal((5, 6)).astype(np.float32))


def out(kit, net, x):
    return kit.array(net(x))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_saved_and_loaded_gives_the_same_outputs(kit, x, tmp_path, kind, options):
    net = build(kit)
    kit.slim.apply_delta(net, kind, ["*query", "*value"], also_train=["head", "body.norm"], **options)
    stir(kit, net)
    stir(kit, net, what="head", seed=4)
    stir(kit, net, what="norm", seed=5)
    y1 = out(kit, net, x)
    kit.slim.save_delta(net, tmp_path / "d")
    fresh = build(kit)
    report = kit.slim.load_delta(fresh, tmp_path / "d")
    np.testing.assert_array_equal(out(kit, fresh, x), y1)
    assert report.notes == ()
    trains = {n for n, p in kit.params(fresh).items() if kit.trains(p)}
    assert trains == {n for n, p in kit.params(net).items() if kit.trains(p)}
    kit.slim.save_delta(fresh, tmp_path / "again")
    for name in ("manifest.json", "delta.safetensors"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_bundle_holds_only_what_was_trained(kit, tmp_path):
    net = build(kit)
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2)
    kit.slim.save_delta(net, tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert set(manifest["tensors"]) == {"body.query.mindpet_delta_lora_a", "body.query.mindpet_delta_lora_b"}
    assert manifest["base"]["layers"] == {"body.query": [8, 8]}
    assert "/" not in json.dumps(manifest)  # no path of the machine it was made on


def test_bitfit_travels_without_any_layer(kit, x, tmp_path):
    net = build(kit)
    kit.slim.freeze_delta(net, "bitfit")
    stir(kit, net, what="bias")
    stir(kit, net, what="beta")
    kit.slim.save_delta(net, tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert set(manifest["extra"]) == {"embed.bias", "body.query.bias", "body.value.bias", "body.norm.bias", "head.bias"}
    fresh = build(kit)
    kit.slim.load_delta(fresh, tmp_path / "d")
    np.testing.assert_array_equal(out(kit, fresh, x), out(kit, net, x))


def test_a_merged_model_saves_the_same_bundle(kit, tmp_path):
    net = build(kit)
    kit.slim.apply_delta(net, "lora", rank=2)
    stir(kit, net)
    kit.slim.save_delta(net, tmp_path / "open")
    kit.slim.merge_delta(net)
    kit.slim.save_delta(net, tmp_path / "merged")
    for name in ("manifest.json", "delta.safetensors"):
        assert (tmp_path / "open" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_several_deltas_travel_together_or_one_by_one(kit, x, tmp_path):
    net = build(kit)
    for seed, name in enumerate(("p", "q")):
        kit.slim.apply_delta(net, "lora", ["*query"], rank=2, name=name)
        stir(kit, net, seed, what=f"_{name}")
    kit.slim.save_delta(net, tmp_path / "both")
    kit.slim.save_delta(net, tmp_path / "q", names="q")
    fresh = build(kit)
    kit.slim.load_delta(fresh, tmp_path / "both")
    np.testing.assert_array_equal(out(kit, fresh, x), out(kit, net, x))
    other = build(kit)
    kit.slim.load_delta(other, tmp_path / "q", name="r")
    kit.slim.load_delta(other, tmp_path / "q", name="default")
    kit.slim.set_delta(net, "q")
    for name in ("r", "default"):
        kit.slim.set_delta(other, name)
        np.testing.assert_array_equal(out(kit, other, x), out(kit, net, x))
    with pytest.raises(ValueError, match="one delta"):
        kit.slim.load_delta(build(kit), tmp_path / "both", name="r")
    with pytest.raises(ValueError, match="'p', 'q'"):
        kit.slim.save_delta(net, tmp_path / "z", names="z")


@pytest.fixture
def saved(kit, tmp_path):
    net = build(kit)
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2, also_train=["head.bias"])
    stir(kit, net)
    return kit.slim.save_delta(net, tmp_path / "d")


def refuse(kit, folder, net, error, words, **options):
    before = snapshot(kit, net)
    with pytest.raises(error, match=words) as caught:
        kit.slim.load_delta(net, folder, **options)
    assert isinstance(caught.value, kit.slim.SlimkitError)
    assert same(snapshot(kit, net), before)


def test_a_base_of_another_shape_is_named(kit, saved):
    refuse(kit, saved, build(kit, width=10), ValueError, r"body\.query has shape \(8, 8\); here it has \(8, 10\)")
    refuse(kit, saved, kit.named(query=kit.linear(8, 8)), ValueError, r"'body\.query', which this model does not have")


def test_another_base_is_reported_or_refused(kit, saved):
    assert "other weights" in kit.slim.load_delta(build(kit, seed=3), saved).notes[0]
    refuse(kit, saved, build(kit, seed=3), ValueError, "other weights", same_base=True)


def test_a_taken_name_is_refused(kit, saved):
    net = build(kit)
    kit.slim.load_delta(net, saved)
    refuse(kit, saved, net, ValueError, "default")


def damage_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


BAD_MANIFESTS = [
    (lambda m: m.update(version=2), "version 2"),
    (lambda m: m.update(format="other"), "not the manifest"),
    (lambda m: m.pop("deltas"), "deltas"),
    (lambda m: m.update(tensors=[]), "tensors"),
    (lambda m: m["tensors"].popitem(), "left over"),
    (lambda m: m["tensors"].update(ghost={"shape": [1], "sha256": ""}), "missing: ghost"),
    (lambda m: m["tensors"]["head.bias"].update(sha256="0" * 64), "head.bias.*digest"),
    (lambda m: m["tensors"]["head.bias"].update(shape=[4]), "head.bias.*shape"),
    (lambda m: m["deltas"][0].update(name="a.b"), "name"),
    (lambda m: m["deltas"][0].update(kind="nope"), "kind"),
    (lambda m: m["deltas"][0].update(layers=3), "not a delta"),
    (lambda m: m["deltas"][0]["layers"]["body.query"].update(rank=3), "shape"),
    (lambda m: m["deltas"][0]["layers"]["body.query"].update(rank="2"), "rank"),
    (lambda m: m["deltas"][0]["layers"]["body.query"].update(ramk=2), "rank"),
    (lambda m: m["deltas"][0]["layers"].update({"body.nope": {"rank": 2}}), r"body\.nope"),
    (lambda m: m.update(extra=["head.bais"]), "head.bais"),
]


@pytest.mark.parametrize(("change", "words"), BAD_MANIFESTS)
def test_a_damaged_manifest_is_refused_and_changes_nothing(kit, saved, change, words):
    damage_manifest(saved, change)
    refuse(kit, saved, build(kit), (ValueError, TypeError), words)


@pytest.mark.parametrize("cut", [0, 4, 40, -8])
def test_a_truncated_file_is_refused(kit, saved, cut):
    file = saved / "delta.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:cut])
    refuse(kit, saved, build(kit), FileFormatError, "safetensors")
    flipped = bytearray(data)
    flipped[-3] ^= 1
    file.write_bytes(bytes(flipped))
    refuse(kit, saved, build(kit), FileFormatError, "digest")


def test_paths_are_checked(kit, saved, tmp_path):
    refuse(kit, tmp_path / "missing", build(kit), FileFormatError, "missing")
    refuse(kit, "", build(kit), ValueError, "directory")
    refuse(kit, 3, build(kit), TypeError, "directory")
    with pytest.raises(ValueError, match="format"):
        kit.slim.save_delta(build(kit), tmp_path / "x", format="pft")


def test_an_interrupted_save_leaves_the_old_bundle(kit, saved, x, monkeypatch):
    from slimkit.core.delta import bundle

    net = build(kit)
    kit.slim.load_delta(net, saved)
    before = out(kit, net, x)
    stir(kit, net, seed=9)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_write_manifest", full)
    with pytest.raises(OSError, match="space"):
        kit.slim.save_delta(net, saved)
    monkeypatch.undo()
    fresh = build(kit)
    kit.slim.load_delta(fresh, saved)
    np.testing.assert_array_equal(out(kit, fresh, x), before)
    kit.slim.save_delta(net, saved)
    fresh = build(kit)
    kit.slim.load_delta(fresh, saved)
    np.testing.assert_array_equal(out(kit, fresh, x), out(kit, net, x))


def built_by_hand(kit):
    floats = kit.torch if kit.name == "torch" else kit.ms
    net = kit.named(
        embed=kit.linear(6, 8),
        lora=kit.slim.LoRADense(8, 8, 2, 4, compute_dtype=floats.float32),
        adapter=kit.slim.AdapterLayer(8, 3, compute_dtype=floats.float32),
        ends=kit.slim.AdapterDense(8, 4, bottleneck_size=2, compute_dtype=floats.float32),
    )
    kit.train_mode(kit.fill(net), False)
    return net


def test_layers_built_by_hand_travel_too(kit, x, tmp_path):
    net = built_by_hand(kit)
    kit.slim.freeze_delta(net, "lora", exclude=["*adapter*"])
    stir(kit, net)
    kit.slim.save_delta(net, tmp_path / "d")
    fresh = built_by_hand(kit)
    kit.slim.load_delta(fresh, tmp_path / "d")
    np.testing.assert_array_equal(out(kit, fresh, x), out(kit, net, x))
    with pytest.raises(ValueError, match="built as a delta layer"):
        kit.slim.remove_delta(fresh)


def test_a_layer_built_with_another_scale_is_refused(kit, tmp_path):
    net = kit.named(lora=kit.slim.LoRADense(8, 8, 2, 4))
    kit.slim.freeze_delta(net, "lora")
    kit.slim.save_delta(net, tmp_path / "d")
    refuse(kit, tmp_path / "d", kit.named(lora=kit.slim.LoRADense(8, 8, 2, 5)), ValueError, "lora was built with alpha")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_peft_prefix_and_prompt_files_fill_what_a_model_was_built_with(kit, tmp_path, rng, kind):
    def model():
        if kind == "prefix":
            return kit.named(prefix=kit.slim.PrefixEncoder(3, num_layers=2, num_heads=2, kv_channels=4))
        return kit.named(prompt=kit.slim.PromptTuning(3, 8))

    net = model()
    stir(kit, net)
    kit.slim.save_delta(net, tmp_path / "d", format="peft")
    fresh = model()
    kit.slim.load_delta(fresh, tmp_path / "d")
    for one, other in zip(kit.params(net).values(), kit.params(fresh).values()):
        np.testing.assert_array_equal(kit.array(one), kit.array(other))
    if kind == "prefix":
        other = kit.named(prefix=kit.slim.PrefixEncoder(3, num_layers=2, num_heads=2, kv_channels=5))
        refuse(kit, tmp_path / "d", other, FileFormatError, "shape")


@pytest.mark.parametrize("form", ["peft", "slimkit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_element_types_survive(kit, x, tmp_path, form, dtype):
    """What a file holds in half precision stays so, bit for bit, on the way through a model and out again."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from slimkit.core.delta import tensors

    net = build(kit)
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2)
    stir(kit, net)
    kit.slim.save_delta(net, tmp_path / "a", format="peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    want = {k: v.astype(kind) for k, v in tensors.read(file, "file").items()}
    save_file(want, file, {"format": "pt"})
    fresh = build(kit)
    kit.slim.load_delta(fresh, tmp_path / "a")
    if form == "slimkit":
        kit.slim.save_delta(fresh, tmp_path / "bundle")
        fresh = build(kit)
        kit.slim.load_delta(fresh, tmp_path / "bundle")
    kit.slim.save_delta(fresh, tmp_path / "again", format="peft")
    got = tensors.read(tmp_path / "again" / "adapter_model.safetensors", "file")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == kind
        np.testing.assert_array_equal(tensors.bits(got[name]), tensors.bits(value))
    # Computed in float32: what the halves hold is all that is lost.
    np.testing.assert_allclose(out(kit, fresh, x), out(kit, net, x), rtol=0.02, atol=0.02)


def test_a_file_without_a_layer_is_refused(kit, tmp_path):
    from safetensors.numpy import save_file

    from slimkit.core.delta import tensors

    net = build(kit)
    kit.slim.apply_delta(net, "lora", ["*query", "*value"], rank=2)
    kit.slim.save_delta(net, tmp_path / "a", format="peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v for k, v in tensors.read(file, "file").items() if "value" not in k}, file, {"format": "pt"})
    refuse(kit, tmp_path / "a", build(kit), FileFormatError, r"missing: body\.value")


def test_a_file_without_a_bias_or_token_rows_that_it_speaks_of_is_refused(kit, tmp_path):
    from safetensors.numpy import save_file

    from slimkit.core import files
    from slimkit.core.delta import tensors

    net = build(kit)
    every = ["*bias"] if kit.name == "torch" else ["*bias", "*beta"]
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2, also_train=every)
    kit.slim.save_delta(net, tmp_path, format="peft")
    config = files.read_json(tmp_path / "adapter_config.json", "x")
    assert config["bias"] == "all"
    for said in ({"words": [1]}, [1]):
        files.write_json(tmp_path / "adapter_config.json", {**config, "trainable_token_indices": said})
        refuse(kit, tmp_path, build(kit), FileFormatError, "rows of.*trainable_token_indices")
    files.write_json(tmp_path / "adapter_config.json", config)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in tensors.read(file, "file").items() if "head.bias" not in k}, file, {"format": "pt"})
    refuse(kit, tmp_path, build(kit), FileFormatError, r"holds no values for head\.bias, which its bias='all'")
