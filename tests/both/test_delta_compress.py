"""Small deltas of tuned models: how near they come, how small they are, and how they travel; in both frameworks."""

import json

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint.weightfile import Weights
from slimkit.core.delta import rest
from slimkit.core.errors import ArgumentError, FileFormatError, PlanError, UnsupportedError
from tests.both.test_delta_apply import out, same, snapshot

KINDS = ("bits", "low_rank", "sparse")


def build(kit, learned=0, width=48):
    net = kit.named(
        table=kit.embedding(40, width), query=kit.linear(width, 64), norm=kit.layer_norm(64), head=kit.linear(64, 3)
    )
    kit.train_mode(kit.fill(net), False)
    rng = np.random.default_rng(learned)
    for parameter in kit.params(net).values() if learned else ():
        shape = tuple(parameter.shape)
        step = rng.standard_normal(shape) * 0.01
        if len(shape) == 2:  # what training learns is near low rank
            step = rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1])) * 0.01 + step * 0.3
        kit.assign(parameter, kit.array(parameter) + step.astype(np.float32))
    return net


@pytest.fixture
def x(kit, rng):
    return kit.tensor(rng.integers(0, 40, (4, 5)).astype(np.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_near_is_small_and_travels(kit, x, tmp_path, kind):
    net, tuned = build(kit), build(kit, 1)
    before, wanted = out(kit, net, x), out(kit, tuned, x)
    report = kit.slim.compress_delta(net, tuned, kind, name="small", bytes_ratio=0.3, exclude=["head"])
    got = out(kit, net, x)
    assert np.abs(got - wanted).mean() < 0.6 * np.abs(before - wanted).mean()
    assert set(report.layers) == {"table", "query"}
    assert "5 tensors travel whole" in report.notes[1]  # the norm's, the head's, and the bias of the linear layer
    assert "times smaller" in report.notes[0]
    kit.slim.save_delta(net, tmp_path / "d", names="small")
    fresh = build(kit)
    kit.slim.load_delta(fresh, tmp_path / "d")
    np.testing.assert_array_equal(out(kit, fresh, x), got)
    with kit.slim.disable_delta(fresh):
        np.testing.assert_array_equal(out(kit, fresh, x), before)
    kit.slim.merge_delta(fresh)
    np.testing.assert_allclose(out(kit, fresh, x), got, atol=1e-5)  # float32, summed in another order
    kit.slim.unmerge_delta(fresh)
    kit.slim.remove_delta(fresh)
    np.testing.assert_array_equal(out(kit, fresh, x), before)
    assert same(snapshot(kit, fresh), snapshot(kit, build(kit)))


def test_bits_are_sixteen_times_smaller_where_the_matrix_is_large(kit):
    net, tuned = kit.named(a=kit.linear(256, 256)), kit.named(a=kit.linear(256, 256))
    kit.fill(net)
    kit.fill(tuned, 1)
    report = kit.slim.compress_delta(net, tuned, bytes_ratio=0.08)
    assert report.layers["a"]["bytes"] <= 0.08 * 2 * 256 * 256
    assert report.layers["a"]["rest"] == "signs"


def test_several_lie_on_one_base_and_take_turns(kit, x, tmp_path):
    net, first, second = build(kit), build(kit, 1), build(kit, 2)
    wanted = {}
    for name, tuned, kind in (("p", first, "bits"), ("q", second, "sparse")):
        kit.slim.compress_delta(net, tuned, kind, name=name)
        wanted[name] = out(kit, net, x)
        kit.slim.save_delta(net, tmp_path / name, names=name)
    fresh = build(kit)
    for name in "pq":
        kit.slim.load_delta(fresh, tmp_path / name)
    for name in "pqp":
        kit.slim.set_delta(fresh, name)
        np.testing.assert_array_equal(out(kit, fresh, x), wanted[name])


def test_tuned_weights_may_be_arrays_or_a_file(kit, x, tmp_path, monkeypatch):
    reads, read = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, name: reads.append(name) or read(self, name))
    net, tuned = build(kit), build(kit, 1)
    kit.slim.compress_delta(net, tuned)
    wanted = out(kit, net, x)
    words = {"embedding_table": "weight", "gamma": "weight", "beta": "bias"}
    values = {
        ".".join([*n.split(".")[:-1], words.get(n.split(".")[-1], n.split(".")[-1])]): v
        for n, v in kit.values(tuned).items()
    }
    files.write_tensors(tmp_path / "model.safetensors", values)
    for source in (values, tmp_path, str(tmp_path / "model.safetensors")):
        fresh = build(kit)
        kit.slim.compress_delta(fresh, source)
        np.testing.assert_array_equal(out(kit, fresh, x), wanted)
    assert reads.count("table.weight") == 2  # once of each of the two sources that are files


def test_what_cannot_be_made_small_changes_nothing(kit, tmp_path):
    net, tuned = build(kit), build(kit, 1)
    before = snapshot(kit, net)
    values = {n: np.zeros((2, 2), np.float32) for n in ("table.weight", "query.weight")}
    for call, error, words in (
        (lambda: kit.slim.compress_delta(net, build(kit)), ArgumentError, "every value is the same"),
        (lambda: kit.slim.compress_delta(net, tuned, "zip"), ArgumentError, "must be one of"),
        (lambda: kit.slim.compress_delta(net, tuned, bytes_ratio=0.05), ArgumentError, "1/16"),
        (lambda: kit.slim.compress_delta(net, build(kit, 1, 32)), PlanError, "has shape"),
        (lambda: kit.slim.compress_delta(net, values), PlanError, "lacks"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert same(snapshot(kit, net), before)
    kit.slim.compress_delta(net, tuned, name="p")
    with pytest.raises(UnsupportedError, match="PEFT"):
        kit.slim.save_delta(net, tmp_path / "peft", format="peft")
    with pytest.raises(UnsupportedError, match=r"compressed|values of its own"):
        kit.slim.combine_delta(net, ["p"])
    with pytest.raises(ArgumentError, match="plain model"):
        kit.slim.compress_delta(build(kit), net)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_a_layer_when_it_comes_off(kit, kind):
    net = build(kit)
    before = {path: set(vars(layer)) for path, layer in kit.children(net)}
    kit.slim.compress_delta(net, build(kit, 1), kind)
    kit.slim.remove_delta(net)
    assert {path: set(vars(layer)) for path, layer in kit.children(net)} == before


def test_places_beyond_the_weight_are_refused(kit, tmp_path):
    net = build(kit)
    kit.slim.compress_delta(net, build(kit, 1), "sparse")
    kit.slim.save_delta(net, tmp_path)
    held = files.read_tensors(tmp_path / "delta.safetensors")[0]
    held["query.mindpet_delta_lora_index"][-1] = 64 * 48
    files.write_tensors(tmp_path / "delta.safetensors", held, {"format": "slimkit-delta"})
    with pytest.raises(FileFormatError, match="digest"):
        kit.slim.load_delta(build(kit), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    name = "query.mindpet_delta_lora_index"
    manifest["tensors"][name]["sha256"] = files.digest_array(held[name])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    fresh = build(kit)
    with pytest.raises(FileFormatError, match="3072 entries"):
        kit.slim.load_delta(fresh, tmp_path)
    assert same(snapshot(kit, fresh), snapshot(kit, build(kit)))


def test_the_random_range_is_about_as_near_as_the_decomposition(rng):
    matrix = (
        rng.standard_normal((300, 12)) @ rng.standard_normal((12, 200)) + 0.3 * rng.standard_normal((300, 200))
    ).astype(np.float32)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    best = np.linalg.norm(matrix - (u[:, :10] * s[:10]) @ vt[:10])
    a, b = rest.nearest(matrix, 10, rng)
    assert np.linalg.norm(matrix - b.astype(np.float32) @ a.astype(np.float32)) < 1.01 * best


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_too(kit, rng, kind):
    def net(seed):
        made = kit.named(conv=kit.conv(8, 24, 3), act=kit.relu())
        kit.train_mode(kit.fill(made, seed), False)
        return made

    base, images = net(0), kit.tensor(rng.standard_normal((2, 8, 6, 6)).astype(np.float32))
    kit.slim.compress_delta(base, net(1), kind, bytes_ratio=0.4)
    got = out(kit, base, images)
    kit.slim.merge_delta(base, unload=True)
    np.testing.assert_allclose(out(kit, base, images), got, atol=2e-4)  # float32, 72 terms, values of 5
