"""Small deltas of tuned models: how near they come, how small they are, and how they travel; in both frameworks."""

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.checkpoint.weightfile import Weights
from slimkit.core.delta import fitted, rest
from slimkit.core.errors import ArgumentError, PlanError, UnsupportedError
from tests.both.test_delta_apply import out, same, snapshot

KINDS = ("bits", "low_rank")


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
    for name, tuned, kind in (("p", first, "bits"), ("q", second, "low_rank")):
        kit.slim.compress_delta(net, tuned, kind, name=name)
        wanted[name] = out(kit, net, x)
        kit.slim.save_delta(net, tmp_path / name, names=name)
    fresh = build(kit)
    for name in "pq":
        kit.slim.load_delta(fresh, tmp_path / name)
    for name in "pqp":
        kit.slim.set_delta(fresh, name)
        np.testing.assert_array_equal(out(kit, fresh, x), wanted[name])


def by_torchs_names(kit, net):
    words = {"embedding_table": "weight", "gamma": "weight", "beta": "bias"}
    parts = {name: name.rpartition(".") for name in kit.values(net)}
    return {f"{parts[n][0]}.{words.get(parts[n][2], parts[n][2])}": v for n, v in kit.values(net).items()}


def test_tuned_weights_may_be_arrays_or_a_file(kit, x, tmp_path, monkeypatch):
    reads, read = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, name: reads.append(name) or read(self, name))
    net, tuned = build(kit), build(kit, 1)
    kit.slim.compress_delta(net, tuned)
    wanted = out(kit, net, x)
    values = by_torchs_names(kit, tuned)
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
    more = by_torchs_names(kit, tuned) | {"head.adapter.bias": np.zeros(3, np.float32)}
    for call, error, words in (
        (lambda: kit.slim.compress_delta(net, build(kit)), ArgumentError, "every value is the same"),
        (lambda: kit.slim.compress_delta(net, tuned, "zip"), ArgumentError, "must be one of"),
        (lambda: kit.slim.compress_delta(net, tuned, bytes_ratio=0.05), ArgumentError, "1/16"),
        (lambda: kit.slim.compress_delta(net, build(kit, 1, 32)), PlanError, "has shape"),
        (lambda: kit.slim.compress_delta(net, values), PlanError, "lacks"),
        (lambda: kit.slim.compress_delta(net, more), PlanError, r"that the base lacks, 'head\.adapter\.bias'"),
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


def test_tied_places_that_tuning_untied_are_refused(kit):
    net = kit.named(table=kit.embedding(40, 16), head=kit.linear(16, 40, bias=False))
    kit.fill(net)
    net.head.weight = next(iter(kit.params(net.table).values()))
    before = snapshot(kit, net)
    table = kit.array(net.head.weight)
    values = {"table.weight": table + 0.01, "head.weight": table + 0.02}
    with pytest.raises(PlanError, match="one tensor in the base and two in tuned"):
        kit.slim.compress_delta(net, values)
    assert same(snapshot(kit, net), before)
    kit.slim.compress_delta(net, values | {"head.weight": table + 0.01}, "low_rank")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_is_the_head_too_gets_the_same_delta_in_both_places(kit, tmp_path, kind):
    def tied(learned=0):
        net = kit.named(table=kit.embedding(40, 16), head=kit.linear(16, 40, bias=False))
        kit.train_mode(kit.fill(net), False)
        table = next(iter(kit.params(net.table).values()))
        step = np.random.default_rng(1).standard_normal(tuple(table.shape)) * 0.01 * learned
        kit.assign(table, kit.array(table) + step.astype(np.float32))
        net.head.weight = table
        return net

    net, rows = tied(), kit.tensor(np.arange(40, dtype=np.int32)[None])
    before, given = out(kit, net, rows), kit.tensor(np.eye(16, dtype=np.float32))
    report = kit.slim.compress_delta(net, tied(1), kind, bytes_ratio=0.3)
    assert set(report.layers) == {"table", "head"}
    got, table, head = out(kit, net, rows), kit.array(net.table(rows))[0], kit.array(net.head(given))
    np.testing.assert_allclose(head, table.T, rtol=1e-5, atol=1e-6)
    assert np.abs(got - before).max() > 1e-3
    kit.slim.save_delta(net, tmp_path)
    fresh = tied()
    kit.slim.load_delta(fresh, tmp_path)
    np.testing.assert_array_equal(out(kit, fresh, rows), got)
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, net, rows), before)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_a_layer_when_it_comes_off(kit, kind):
    net = build(kit)
    before = {path: set(vars(layer)) for path, layer in kit.children(net)}
    kit.slim.compress_delta(net, build(kit, 1), kind)
    kit.slim.remove_delta(net)
    assert {path: set(vars(layer)) for path, layer in kit.children(net)} == before


def chain(kit, seed):
    """Three layers of which each spoils what the next is given; inputs lie near a plane, as activations do."""
    net = kit.named(a=kit.linear(40, 64), act=kit.relu(), b=kit.linear(64, 64), act2=kit.relu(), c=kit.linear(64, 10))
    kit.train_mode(kit.fill(net), False)
    rng = np.random.default_rng(seed)
    for parameter in kit.params(net).values() if seed else ():
        value = kit.array(parameter)
        kit.assign(parameter, value + (0.3 * value.std() * rng.standard_normal(value.shape)).astype(np.float32))
    return net


def rows(kit, count, seed):
    rng, plane = np.random.default_rng(seed), np.random.default_rng(9).standard_normal((8, 40))
    x = rng.standard_normal((count, 8)) @ plane + 0.1 * rng.standard_normal((count, 40)) + 0.5
    return kit.tensor(x.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_data_makes_the_same_bytes_say_more(kit, tmp_path, kind):
    tuned, held = chain(kit, 1), rows(kit, 64, 3)
    want, missed, sizes = out(kit, tuned, held), {}, {}
    for way, data in (("weights", None), ("data", [rows(kit, 100, 4), rows(kit, 100, 5)])):
        net = chain(kit, 0)
        report = kit.slim.compress_delta(net, tuned, kind, bytes_ratio=0.3, calibration=data)
        got = out(kit, net, held)
        missed[way] = float(np.square(got - want).sum())
        sizes[way] = [layer["bytes"] for layer in report.layers.values()]
        assert all(0 < layer["error"] < 1 for layer in report.layers.values())
    assert missed["data"] < 0.4 * missed["weights"]
    assert sizes["data"] == sizes["weights"]
    kit.slim.save_delta(net, tmp_path)
    fresh = chain(kit, 0)
    kit.slim.load_delta(fresh, tmp_path)
    np.testing.assert_array_equal(out(kit, fresh, held), got)
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), snapshot(kit, chain(kit, 0)))
    assert same(snapshot(kit, tuned), snapshot(kit, chain(kit, 1)))


def test_data_that_cannot_be_read_changes_nothing(kit):
    net, tuned = chain(kit, 0), chain(kit, 1)
    before = snapshot(kit, net)
    for data, error, words in (
        ([], ArgumentError, "at least one batch"),
        (rows(kit, 4, 1), TypeError, "a list of batches"),
        ([rows(kit, 4, 1), kit.tensor(np.zeros((2, 3), np.float32))], Exception, None),
        ([kit.tensor(np.full((2, 40), np.inf, np.float32))], ArgumentError, "finite"),
    ):
        with pytest.raises(error, match=words):
            kit.slim.compress_delta(net, tuned, calibration=data)
    with pytest.raises(ArgumentError, match="tuned model itself"):
        kit.slim.compress_delta(net, kit.values(tuned), calibration=[rows(kit, 4, 1)])
    assert same(snapshot(kit, net), before)
    kit.slim.compress_delta(net, tuned, calibration=[rows(kit, 9, 1)])  # the name is free


def test_a_layer_that_is_given_nothing_is_told_of(kit):
    net, tuned = chain(kit, 0), chain(kit, 1)
    for one in (net, tuned):
        for name, parameter in kit.params(one).items():
            if name.startswith("a.") or name == "a":
                kit.assign(parameter, -np.abs(kit.array(parameter)))
    report = kit.slim.compress_delta(net, tuned, calibration=[kit.tensor(np.ones((6, 40), np.float32))])
    assert "nothing comparable of 1 layers: b" in " ".join(report.notes)  # a's answers are all below zero
    assert {path: layer["error"] < 0.9 for path, layer in report.layers.items()} == {"a": True, "b": True, "c": True}
    assert np.isfinite(out(kit, net, rows(kit, 4, 1))).all()


def test_the_sweep_is_better_than_the_signs_and_its_scales_are_the_best(rng):
    x = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 30)) + 0.2 * rng.standard_normal((500, 30))
    change, gram = rng.standard_normal((12, 30)).astype(np.float32), (x.T @ x / 500 + 0.05 * np.eye(30))

    def cost(signs, scale):
        error = change - np.where(signs, scale[:, None], -scale[:, None])
        return np.trace(error @ gram @ error.T)

    signs, scale = fitted.swept(change, gram)
    plain = np.abs(change).mean(1)
    assert cost(signs, scale) < 0.7 * cost(change >= 0, plain)
    for factor in (0.99, 1.01):
        assert cost(signs, scale) < cost(signs, factor * scale)


def test_the_layer_answers_as_the_tuned_one_where_rank_is_no_bound(rng):
    """R = T - B + T (C - G) G^-1, by its definition: least squares of T x by (B + R) y, in NumPy."""
    tuned, base = (rng.standard_normal((5, 12)).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((400, 12)).astype(np.float32)
    y = (x + 0.3 * rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))).astype(np.float32)
    pairs = fitted.PairedMoments()
    for part in (slice(0, 150), slice(150, None)):
        pairs.add(x[part], y[part])
    found = fitted.solve(base, tuned, None, pairs, "", 5, rng)
    got = base + found.parts["b"].astype(np.float32) @ found.parts["a"].astype(np.float32)
    ridge = fitted.DAMPING * np.trace(y.T @ y) / 12
    want = np.linalg.solve(y.T @ y + ridge * np.eye(12), y.T @ (x @ tuned.T) + ridge * tuned.T).T
    np.testing.assert_allclose(got, want, atol=2e-2)  # a and b in float16, values of 3


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
