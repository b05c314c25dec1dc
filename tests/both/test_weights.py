"""prune_model_weight on both frameworks, from one file, against NumPy."""

import json

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint import weightfile
from slimkit.core.errors import ConfigError, FileFormatError, LinkPathError, PatternError, PlanError, UnsupportedError
from slimkit.core.naming import torch_name
from slimkit.core.weights.blocks import PruneConfig
from tests import kits
from tests.conftest import INSTALLED

HEADS, SIZE = 4, 2


def transformer(kit, blocks=4, heads=HEADS, keys=HEADS, ffn=6, width=8):
    """A decoder's parameters under the usual names; nothing is run, only loaded."""

    def block():
        attention = kit.named(
            q_proj=kit.linear(width, heads * SIZE),
            k_proj=kit.linear(width, keys * SIZE),
            v_proj=kit.linear(width, keys * SIZE),
            o_proj=kit.linear(heads * SIZE, width),
        )
        attention.num_heads = heads
        attention.num_key_value_heads = keys
        mlp = kit.named(up_proj=kit.linear(width, ffn), down_proj=kit.linear(ffn, width))
        return kit.named(norm=kit.layer_norm(width), self_attn=attention, mlp=mlp)

    layers = kit.sequential(*(block() for _ in range(blocks)))
    return kit.named(embed=kit.embedding(11, width), layers=layers, norm=kit.layer_norm(width))


def large(kit, rng, **sizes):
    """The large model's tensors under the framework's own names; values depend on shape order alone."""
    shapes = {n: a.shape for n, a in kit.values(transformer(kit, **sizes)).items()}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write(path, tensors):
    files.write_tensors(path, tensors)
    return path


def steps(*names, selection="first"):
    return PruneConfig().set_steps(list(names)).set_selection(selection)


INTRA, BLOCKS = "prune_bert_intra_block", "prune_blocks"


def test_first_equals_slicing(kit, rng, tmp_path):
    tensors = large(kit, rng)
    small = transformer(kit, heads=2, keys=2, ffn=3, width=4)
    report = kit.room("weights").prune_model_weight(small, steps(INTRA), write(tmp_path / "w.safetensors", tensors))
    for name, value in kit.values(small).items():
        assert np.array_equal(value, tensors[name][tuple(slice(n) for n in value.shape)]), name
    assert set(report["cut"]) == set(kit.values(small)) - set(report["copied"])
    assert report["unused"] == report["initialised"] == report["dropped"] == []
    json.dumps(report)


def test_blocks_are_taken_by_the_map(kit, rng, tmp_path):
    tensors = large(kit, rng)
    small = transformer(kit, blocks=2)
    config = steps(BLOCKS).add_blocks_params(r"layers.(\d+).", {0: 1, 1: 3})
    report = kit.room("weights").prune_model_weight(small, config, write(tmp_path / "w.safetensors", tensors))
    for name, value in kit.values(small).items():
        old = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.1.")
        assert np.array_equal(value, tensors[old]), name
    assert all(n.startswith(("layers.0.", "layers.2.")) for n in report["dropped"])
    assert len(report["dropped"]) == len(report["renamed"]) > 0


def test_importance_keeps_the_live_heads_and_channels_of_every_coupled_tensor(kit, rng, tmp_path):
    tensors = large(kit, rng)
    heads, channels = [1, 3], [0, 4, 5]
    rows = [h * SIZE + i for h in heads for i in range(SIZE)]
    for name, value in tensors.items():
        # Only the live heads and channels have weights; which they are, importance must find out.
        if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
            value[[r for r in range(8) if r not in rows]] *= 1e-3
        if name.endswith("o_proj.weight"):
            value[:, [r for r in range(8) if r not in rows]] *= 1e-3
        if ".up_proj." in name:
            value[[c for c in range(6) if c not in channels]] *= 1e-3
        if name.endswith("down_proj.weight"):
            value[:, [c for c in range(6) if c not in channels]] *= 1e-3
    small = transformer(kit, heads=2, keys=2, ffn=3)
    config = steps(INTRA, selection="importance")
    report = kit.room("weights").prune_model_weight(small, config, write(tmp_path / "w.safetensors", tensors))
    for name, value in kit.values(small).items():
        expected = tensors[name]
        if any(p in name for p in (".q_proj.", ".k_proj.", ".v_proj.")):
            expected = expected[rows]
        elif name.endswith("o_proj.weight"):
            expected = expected[:, rows]
        elif ".up_proj." in name:
            expected = expected[channels]
        elif name.endswith("down_proj.weight"):
            expected = expected[:, channels]
        assert np.array_equal(value, expected), name
    assert report["choices"]["layers.2.self_attn"] == {"heads": heads, "key_heads": heads}


def test_grouped_query_heads_stay_with_their_key_head(kit, rng, tmp_path):
    tensors = large(kit, rng, keys=2)
    for name, value in tensors.items():
        if name.endswith("o_proj.weight"):
            value[:, : 2 * SIZE] *= 1e-3  # the queries of key head 0 reach the output least
    small = transformer(kit, heads=2, keys=1)
    config = steps(INTRA, selection="importance")
    report = kit.room("weights").prune_model_weight(small, config, write(tmp_path / "w.safetensors", tensors))
    assert report["choices"]["layers.0.self_attn"] == {"heads": [2, 3], "key_heads": [1]}
    values = kit.values(small)
    assert np.array_equal(
        values["layers.0.self_attn.k_proj.weight"], tensors["layers.0.self_attn.k_proj.weight"][SIZE:]
    )
    assert np.array_equal(
        values["layers.0.self_attn.q_proj.weight"], tensors["layers.0.self_attn.q_proj.weight"][2 * SIZE :]
    )


def test_importance_chooses_one_width_for_the_whole_model(kit, rng, tmp_path):
    tensors = large(kit, rng)
    keep = [0, 2, 3, 5, 6, 7]
    for name, value in tensors.items():
        if "norm" in name and name.endswith(("weight", "gamma")):
            value[:] = 0.5 + rng.random(8)
            value[[1, 4]] = 0.1
    small = transformer(kit, width=6)
    config = steps(INTRA, selection="importance").set_head_size(SIZE)
    kit.room("weights").prune_model_weight(small, config, write(tmp_path / "w.safetensors", tensors))
    for name, value in kit.values(small).items():
        expected = tensors[name]
        for axis, (have, want) in enumerate(zip(expected.shape, value.shape)):
            expected = np.take(expected, keep, axis) if have != want else expected
        assert np.array_equal(value, expected), name


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_files_of_other_precision_arrive_in_the_models(kit, rng, tmp_path, dtype):
    tensors = {n: v.astype(np.float16).astype(np.float32) for n, v in large(kit, rng).items()}
    stored = {n: weightfile.encode(v, dtype) for n, v in tensors.items()}
    entries = {n: weightfile.Entry(dtype, v.shape) for n, v in tensors.items()}
    weightfile.stream_safetensors(tmp_path / "w.safetensors", entries, stored.items())
    small = transformer(kit, ffn=3)
    kit.room("weights").prune_model_weight(small, steps(INTRA), tmp_path / "w.safetensors")
    for name, value in kit.values(small).items():
        expected = weightfile.decode(stored[name], dtype)[tuple(slice(n) for n in value.shape)].astype(np.float32)
        assert value.dtype == np.float32
        assert np.array_equal(value, expected), name


def test_a_sharded_index_and_a_folder_load_like_one_file(kit, rng, tmp_path):
    tensors = large(kit, rng)
    names = list(tensors)
    table = {}
    for number in range(3):
        part = names[number::3]
        files.write_tensors(tmp_path / f"model-{number}.safetensors", {n: tensors[n] for n in part})
        table |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    files.write_json(index, {"metadata": {}, "weight_map": table})
    for path in (index, tmp_path, str(tmp_path)):
        small = transformer(kit, ffn=3)
        kit.room("weights").prune_model_weight(small, steps(INTRA), path)
        for name, value in kit.values(small).items():
            assert np.array_equal(value, tensors[name][tuple(slice(n) for n in value.shape)]), name


def refused(kit, small, config, path, error, words, **kw):
    before = kit.values(small)
    with pytest.raises(error, match=words):
        kit.room("weights").prune_model_weight(small, config, path, **kw)
    after = kit.values(small)
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(kit, rng, tmp_path):
    tensors = large(kit, rng)
    path = write(tmp_path / "w.safetensors", tensors)
    shallow = transformer(kit, blocks=2)
    refused(kit, shallow, steps(INTRA), path, PlanError, "have no place in the model.*prune_blocks")
    config = steps(BLOCKS).add_blocks_params(r"layers.(\d+).", {0: 0})
    refused(kit, shallow, config, path, ConfigError, "blocks 0 to 1")
    refused(kit, shallow, steps(BLOCKS).add_blocks_params(r"h.(\d+)", {0: 0, 1: 1}), path, PatternError, "matches none")
    both = steps(BLOCKS).add_blocks_params(r"layers.(\d+).", {0: 0, 1: 9})
    refused(kit, shallow, both, path, ConfigError, "asks for block 9")
    narrow = transformer(kit, ffn=3)
    every = steps(BLOCKS).add_blocks_params(r"layers.(\d+).", {i: i for i in range(4)})
    refused(kit, narrow, every, path, PlanError, "prune_bert_intra_block")
    wide = transformer(kit, ffn=7)
    refused(kit, wide, steps(INTRA), path, PlanError, "cut, not grown")
    odd = transformer(kit, heads=3, keys=2)
    refused(kit, odd, steps(INTRA, selection="importance"), path, UnsupportedError, "evenly")
    del tensors["norm" + (".weight" if kit.name == "torch" else ".gamma")]
    refused(kit, narrow, steps(INTRA), write(tmp_path / "x.safetensors", tensors), PlanError, "no tensor in the file")


def test_arguments_are_checked(kit, rng, tmp_path):
    path = write(tmp_path / "w.safetensors", large(kit, rng))
    small = transformer(kit)
    prune = kit.room("weights").prune_model_weight
    with pytest.raises(TypeError, match="model"):
        prune("model", steps(INTRA), path)
    with pytest.raises(TypeError, match="config"):
        prune(small, {"steps": []}, path)
    with pytest.raises(TypeError, match="weight_file_path"):
        prune(small, steps(INTRA), 3)
    with pytest.raises(TypeError, match="strict"):
        prune(small, steps(INTRA), path, strict=1)
    refused(kit, small, PruneConfig().set_steps([BLOCKS]), path, ConfigError, "add_blocks_params")
    refused(kit, small, steps(INTRA), tmp_path / "none.safetensors", FileFormatError, "existing")
    (tmp_path / "link.safetensors").symlink_to(path)
    refused(kit, small, steps(INTRA), tmp_path / "link.safetensors", LinkPathError, "symbolic link")
    (tmp_path / "w.txt").write_text("no weights")
    refused(kit, small, steps(INTRA), tmp_path / "w.txt", FileFormatError, "ends in")


def test_not_strict_reports_what_was_left(kit, rng, tmp_path):
    tensors = large(kit, rng)
    gone = next(iter(tensors))
    first = tensors.pop(gone)
    tensors["cls.head.weight"] = first
    small = transformer(kit, ffn=3)
    before = kit.values(small)[gone]
    path = write(tmp_path / "w.safetensors", tensors)
    report = kit.room("weights").prune_model_weight(small, steps(INTRA), path, strict=False)
    assert report["initialised"] == [gone]
    assert report["unused"] == ["cls.head.weight"]
    assert np.array_equal(kit.values(small)[gone], before)


def test_a_damaged_tensor_is_found_before_anything_is_changed(kit, rng, tmp_path, monkeypatch):
    path = write(tmp_path / "w.safetensors", large(kit, rng))
    read = weightfile.read_into

    def failing(handle, offset, array, what):
        if "'norm" in what:
            raise FileFormatError("bad sector")
        read(handle, offset, array, what)

    monkeypatch.setattr(weightfile, "read_into", failing)
    refused(kit, transformer(kit), steps(INTRA), path, FileFormatError, "bad sector")


def test_both_frameworks_keep_the_same_heads_and_values(rng, tmp_path):
    made = {}
    for name in INSTALLED:
        kit = kits.make(name)
        tensors = {torch_name(n): v for n, v in large(kit, np.random.default_rng(5)).items()}
        path = write(tmp_path / f"{name}.safetensors", tensors)
        small = transformer(kit, heads=2, keys=2, ffn=3)
        report = kit.room("weights").prune_model_weight(small, steps(INTRA, selection="importance"), path)
        made[name] = ({torch_name(n): v for n, v in kit.values(small).items()}, report["choices"])
    one, *others = made.values()
    for other in others:
        assert other[1] == one[1]
        assert all(np.array_equal(v, other[0][n]) for n, v in one[0].items())
