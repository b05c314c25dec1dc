"""How many weights become zero: the exact total, spread over layers and rows, and never a whole layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.allocate import spread
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.pattern import keep_across_rows
from slimkit.core.sparse.maths.solve import solve
from slimkit.core.sparse.totals import counts

METHODS = ("magnitude", "wanda", "hessian", "par", "par_v2")


def narrow(kit):
    """Layers of few columns: a first convolution of three channels, a depthwise one, a row of seven weights."""
    return kit.fill(
        kit.named(
            first=kit.conv(3, 16, 1),
            act=kit.relu(),
            deep=kit.conv(16, 16, 3, padding=1, groups=16),
            act2=kit.relu(),
            last=kit.conv(16, 7, 1),
        )
    )


def images(kit):
    rng = np.random.default_rng(0)
    return [kit.tensor(rng.standard_normal((2, 3, 8, 8)).astype(np.float32)) for _ in range(3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.5, 0.85, 0.95, 0.999])
def test_the_total_is_exact_and_no_layer_is_lost(kit, method, ratio):
    model = narrow(kit)
    report = kit.slim.Compressor(model, SparseConfig(method=method, sparse_ratio=ratio)).compress(images(kit))
    found = {n: v for n, v in kit.values(model).items() if v.ndim > 1}
    zeros = {n: int((v == 0).sum()) for n, v in found.items()}
    total = sum(v.size for v in found.values())
    assert sum(zeros.values()) == report["zeros"] == min(round(ratio * total), total - len(found))
    assert all(n < found[name].size for name, n in zeros.items())
    assert report["fallbacks"] == {}


@pytest.mark.parametrize("extra", [{"uniform": False}, {"progressive": True}, {"sequential": False}])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.98])
def test_the_total_is_exact_however_it_is_reached(kit, extra, ratio):
    model = narrow(kit)
    config = SparseConfig(method="hessian" if "progressive" in extra else "wanda", sparse_ratio=ratio, **extra)
    report = kit.slim.Compressor(model, config).compress(images(kit))
    found = [v for v in kit.values(model).values() if v.ndim > 1]
    assert sum(int((v == 0).sum()) for v in found) == report["zeros"] == round(ratio * report["weights"])
    assert all(v.any() for v in found)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_keeps_its_count_in_every_group(kit, method):
    model = kit.fill(kit.named(first=kit.linear(16, 5), act=kit.relu(), last=kit.linear(5, 3)))
    rng = np.random.default_rng(0)
    data = [kit.tensor(rng.standard_normal((32, 16)).astype(np.float32)) for _ in range(2)]
    config = SparseConfig(method=method, pattern="1:4", targets=["first"])
    report = kit.slim.Compressor(model, config).compress(data)
    kept = (kit.values(model)["first.weight"] != 0).reshape(-1, 4).sum(1)
    assert (kept == 1).all()
    assert report["ratio"] == 0.75


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_one_weight_that_is_not_finite_names_its_layer(kit, method, value):
    model = narrow(kit)
    weight = kit.values(model)["deep.weight"].copy()
    weight[3, 0, 1, 1] = value
    kit.assign(kit.params(model)["deep.weight"], weight)
    before = kit.values(model)
    with pytest.raises(ArgumentError, match="weight of 'deep' must be finite"):
        kit.slim.Compressor(model, SparseConfig(method=method)).compress(images(kit))
    for name, old in before.items():
        np.testing.assert_array_equal(kit.values(model)[name], old)


def test_what_a_layer_left_alone_spoils_is_not_blamed_on_the_data(kit):
    model = kit.fill(kit.named(first=kit.linear(4, 6), last=kit.linear(6, 3)))
    kit.assign(kit.params(model)["first.bias"], np.full(6, np.nan, np.float32))
    data = [kit.tensor(np.ones((32, 4), np.float32))]
    with pytest.raises(ArgumentError, match=r"input of 'last'.*the model itself holds NaN or infinity in 'first.bias'"):
        kit.slim.Compressor(model, SparseConfig(method="wanda")).compress(data)


sizes = st.lists(st.sampled_from([1, 2, 3, 9, 27, 100, 4096]), min_size=1, max_size=12)
ratios = st.one_of(st.sampled_from([0.001, 0.05, 0.5, 0.85, 0.95, 0.999]), st.floats(0.001, 0.999))


@given(sizes, ratios)
def test_counts_add_up_and_leave_every_layer_a_weight(found, ratio):
    layers = {str(i): n for i, n in enumerate(found)}
    given_out = counts(layers, dict.fromkeys(layers, ratio))
    total = sum(found)
    assert sum(given_out.values()) == min(round(ratio * total), total - len(found))
    assert all(0 <= given_out[name] < size for name, size in layers.items())


@given(sizes, st.data())
def test_counts_of_unequal_ratios_add_up(found, data):
    layers = {str(i): n for i, n in enumerate(found)}
    asked = {name: data.draw(ratios) for name in layers}
    given_out = counts(layers, asked)
    wanted = sum(asked[name] * size for name, size in layers.items())
    # Rounded once; half way between two numbers the order of the sum decides.
    assert abs(sum(given_out.values()) - min(wanted, sum(found) - len(found))) <= 0.5 + 1e-6
    assert all(0 <= given_out[name] < size for name, size in layers.items())


@pytest.mark.parametrize("ratio", [0.002, 0.01, 0.5, 0.9, 0.985, 0.995, 0.999])
def test_measured_ratios_meet_the_total_at_the_edges_too(ratio):
    around = [max(0.02, ratio - 0.1), min(0.98, ratio + 0.1)]
    found = spread({"a": [1, 2], "b": [1, 8]}, around, {"a": 10, "b": 30}, ratio)
    assert abs((found["a"] + 3 * found["b"]) / 4 - ratio) < 1e-9  # a bisection in float64
    assert all(0 < r < 1 for r in found.values())


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_rows_share_evenly_and_the_rest_goes_where_it_costs_least(rows, columns, data):
    seed = data.draw(st.integers(0, 99))
    n_zeros = data.draw(st.integers(0, rows * columns))
    scores = np.random.default_rng(seed).integers(0, 9, (rows, columns)).astype(np.float64)
    keep = keep_across_rows(scores, n_zeros)
    dropped = (~keep).sum(1)
    assert dropped.sum() == n_zeros
    assert dropped.max() - dropped.min() <= 1
    for row, mask, n in zip(scores, keep, dropped):
        assert sorted(row[~mask]) == sorted(row)[:n]
    more, fewer = dropped == dropped.max(), dropped == dropped.min()
    if not more.all():
        ordered = np.sort(scores, 1)
        nth = dropped.min()
        assert ordered[more, nth].max() <= ordered[fewer, nth].min()


class _Padded:
    """A net that takes tokens and a mask, as language models do."""

    def __new__(cls, kit):
        class Net(kit.Module):
            def __init__(self):
                super().__init__()
                self.first, self.act, self.last = kit.linear(8, 8), kit.relu(), kit.linear(8, 4)

            def forward(self, x, attention_mask):
                return self.last(self.act(self.first(x)))

            construct = forward

        return kit.fill(Net())


def padded(kit, *lengths):
    rng = np.random.default_rng(0)
    return [
        {
            "x": kit.tensor(rng.standard_normal((2, 32, 8)).astype(np.float32)),
            "attention_mask": kit.tensor((np.arange(32) < np.full((2, 1), n)).astype(np.int64)),
        }
        for n in lengths
    ]


@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
def test_nothing_but_padding_is_said_to_be_that(kit, method):
    model = _Padded(kit)
    before = kit.values(model)
    with pytest.raises(ArgumentError, match="tokens that are no padding"):
        kit.slim.Compressor(model, SparseConfig(method=method)).compress(padded(kit, 0, 0))
    for name, old in before.items():
        np.testing.assert_array_equal(kit.values(model)[name], old)
    report = kit.slim.Compressor(model, SparseConfig(method=method)).compress(padded(kit, 0, 20, 0))
    assert report["fallbacks"] == {}
    assert {row["rows"] for row in report["layers"].values()} == {2 * 20}


def test_moments_without_a_row_stay_finite():
    layer = SparseLayer("fc", "linear", (3, 4))
    moments = Moments(layer)
    moments.add(np.zeros((0, 4), np.float32))
    for _ in range(2):  # layers that share their input share these
        solved = solve(layer, np.arange(12.0).reshape(3, 4), moments, 0.5, SparseConfig(method="hessian"))
        assert solved.account["fallback"].startswith("saw 0 calibration rows")


def test_a_copy_keeps_its_frozen_zeros(kit):
    model = kit.fill(kit.named(first=kit.linear(8, 8), act=kit.relu(), last=kit.linear(8, 4)))
    kit.slim.Compressor(model, SparseConfig()).compress()
    handle = kit.slim.freeze_zeros(model)
    twin = copy.deepcopy(model)
    again = copy.deepcopy(twin)
    rng = np.random.default_rng(0)
    x = kit.tensor(rng.standard_normal((16, 8)).astype(np.float32))
    for one in (twin, again, model):
        before = kit.values(one)
        _train(kit, one, x)
        for name in ("first.weight", "last.weight"):
            now = kit.values(one)[name]
            assert ((now == 0) == (before[name] == 0)).all()
            assert not np.array_equal(now, before[name])
    handle.remove()
    _train(kit, model, x)
    assert (kit.values(model)["first.weight"] != 0).sum() > 32
    _train(kit, twin, x)
    assert (kit.values(twin)["first.weight"] == 0).sum() == 32


def _train(kit, model, x):
    if kit.name == "torch":
        optimizer = kit.torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return
    optimizer = kit.ms.nn.AdamWeightDecay(model.trainable_params(), learning_rate=0.05)
    gradient = kit.ms.value_and_grad(lambda v: model(v).square().mean(), None, optimizer.parameters)
    for _ in range(2):
        optimizer(gradient(x)[1])
