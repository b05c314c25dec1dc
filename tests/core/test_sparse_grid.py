"""Weights that stay on a coarse grid: legal values, never worse than plain rounding, fewer bits a weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit.core.ascend.entropy import byte_entropy
from slimkit.core.errors import ConfigError
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths.grid import FloatGrid, IntegerGrid, on_grid, steps_of
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.solve import solve

FLOATS = st.floats(2**-20, 2**15, allow_subnormal=False)


def on(values, bits):
    """Whether values are sign * 2^e * (1 + k / 2^bits), by their bytes: the mantissa's tail is empty."""
    tail = np.asarray(values, np.float32).view(np.uint32) & ((1 << (23 - bits)) - 1)
    return tail == 0


def problem(seed, out=12, n=40, rows=200):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n // 2, n))
    x = rng.standard_normal((rows, n // 2)) @ mix + 0.3 * rng.standard_normal((rows, n))
    return rng.standard_normal((out, n)), x.T @ x / rows


def error(target, q, gram):
    missing = target - q
    return float(np.trace(missing @ gram @ missing.T))


@given(FLOATS, st.integers(1, 10), st.sampled_from([-1.0, 1.0]))
def test_the_nearest_value_is_on_the_grid_and_no_other_is_nearer(size, bits, sign):
    found = FloatGrid(bits).nearest(np.array([sign * size]))[0]
    assert on(found, bits)
    exponent = np.floor(np.log2(size))
    steps = 2.0**exponent * (1 + np.arange(2 * 2**bits + 1) / 2**bits)  # up to the second next power
    assert abs(found - sign * size) <= np.min(np.abs(steps - size)) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_descent_stays_on_the_mask_and_the_grid_and_beats_rounding(bits, outliers):
    for seed in range(5):
        target, gram = problem(seed)
        keep = np.random.default_rng(seed + 10).random(target.shape) < 0.6
        weight = target * keep
        most = int(outliers * keep.sum())
        found, mask, facts = on_grid(weight, keep, gram, FloatGrid(bits), most)
        assert np.array_equal(found != 0, keep)
        assert np.array_equal(mask, keep)
        assert facts["outliers"] == most
        assert np.count_nonzero(~on(found, bits)) <= facts["outliers"]
        plain = on_grid(weight, keep, None, FloatGrid(bits), most)[0]
        before, after = error(weight, plain, gram), error(weight, found, gram)
        assert after < before
        if not outliers:  # without inputs others are left out of the rounding
            rows = [error(weight[i : i + 1], found[i : i + 1], gram) for i in range(len(target))]
            others = [error(weight[i : i + 1], plain[i : i + 1], gram) for i in range(len(target))]
            assert all(a <= b * (1 + 1e-9) for a, b in zip(rows, others, strict=True))
            assert facts["rounding_gain"] == pytest.approx(1 - after / before, abs=1e-6)


def test_the_best_of_all_choices_is_found_or_nearly():
    """Against every combination of the two neighbours of each of six weights."""
    found, best = 0.0, 0.0
    for seed in range(20):
        target, gram = problem(seed, out=1, n=6)
        keep = np.ones_like(target, dtype=bool)
        down = np.sign(target) * 2.0 ** np.floor(np.log2(abs(target)))
        step = 2.0 ** (np.floor(np.log2(abs(target))) - 1)
        down += np.sign(target) * np.floor((abs(target) - abs(down)) / step) * step
        choices = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
        every = down + np.sign(target) * choices * step
        best += min(error(target, q[None], gram) for q in every)
        found += error(target, on_grid(target, keep, gram, FloatGrid(1))[0], gram)
    assert found < 1.5 * best


@pytest.mark.parametrize("method", ["magnitude", "wanda", "hessian", "par", "par_v2"])
def test_every_method_rounds_what_it_keeps(method):
    rng = np.random.default_rng(0)
    layer, weight = SparseLayer("layer", "linear", (16, 32)), rng.standard_normal((16, 32)).astype(np.float32)
    moments = Moments(layer)
    moments.add(rng.standard_normal((400, 32)).astype(np.float32))
    config = SparseConfig(method=method, sparse_ratio=0.3, mantissa_bits=2, outliers=0.02)
    solved = solve(layer, weight, None if method == "magnitude" else moments, 0.3, config)
    assert solved.account["zeros"] == round(0.3 * weight.size)
    assert np.count_nonzero(~on(solved.weight, 2)) <= solved.account["outliers"] == int(0.02 * 0.7 * weight.size + 0.5)
    dense = byte_entropy(weight.astype(np.float16))
    zeros = solve(layer, weight, moments, 0.3, SparseConfig(method=method, sparse_ratio=0.3)).weight
    assert byte_entropy(solved.weight.astype(np.float16)) < 0.6 * byte_entropy(zeros.astype(np.float16)) < 0.6 * dense


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_whole_numbers_stand_in_the_weight_itself(dtype, pattern):
    """The step is the row's largest weight by 127; half floats still say every whole number."""
    rng = np.random.default_rng(1)
    layer, weight = SparseLayer("layer", "linear", (16, 32)), rng.standard_normal((16, 32)).astype(np.float32)
    weight[3] = 0.0
    moments = Moments(layer)
    moments.add(rng.standard_normal((400, 32)).astype(np.float32))
    found = {
        bits: solve(layer, weight, moments, 0.5, SparseConfig(method="par", pattern=pattern, weight_bits=bits))
        for bits in (None, 3, 8)
    }
    stored = found[8].weight.astype(dtype).astype(np.float64)
    ratios = stored / steps_of(stored, 8)
    assert np.abs(ratios - np.round(ratios)).max() < (0.07 if dtype == np.float16 else 1e-3)
    assert np.array_equal(np.abs(np.round(ratios)).max(axis=1), np.where(np.any(stored, axis=1), 127, 0))
    assert not np.any(stored[~found[8].keep.astype(bool)])
    errors = [found[bits].account["output_error"] for bits in (None, 8, 3)]
    assert 0.99 * errors[0] < errors[1] < 1.01 * errors[0] < errors[2]
    assert 0 < found[8].account["rounding_gain"] < 1


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("method", ["par", "par_v2"])
def test_the_error_told_after_rounding_is_of_what_the_layer_was_fitted_to(method, has_bias):
    """A method uses up what it is fitted to; the error after rounding and swaps was measured against what it left."""
    rng = np.random.default_rng(2)
    layer, weight = SparseLayer("layer", "linear", (16, 32), has_bias=has_bias), rng.standard_normal((16, 32))
    dense = rng.standard_normal((600, 32))
    moments = Moments(layer, paired=True)
    moments.add(dense + 0.1 * rng.standard_normal(dense.shape), dense)
    told = [
        solve(layer, weight, moments, 0.5, SparseConfig(method=method, **more)).account["output_error"]
        for more in ({}, {"weight_bits": 8}, {"mantissa_bits": 8}, {"swaps": 2})
    ]
    assert 0.05 < told[0] < 0.9
    assert all(0.9 * told[0] < error < 1.01 * told[0] for error in told[1:]), told


def test_descent_on_whole_numbers_beats_rounding_row_by_row():
    for seed in range(5):
        target, gram = problem(seed)
        keep = np.random.default_rng(seed + 10).random(target.shape) < 0.6
        weight = target * keep
        grid = IntegerGrid(steps_of(weight, 4), 4)
        plain, found = (on_grid(weight, keep, g, grid)[0] for g in (None, gram))
        for i in range(len(target)):
            row = slice(i, i + 1)
            assert error(weight[row], found[row], gram) <= error(weight[row], plain[row], gram) * (1 + 1e-9)


def test_entropy_is_that_of_the_bytes():
    assert byte_entropy(np.zeros(7, np.float16)) == 0.0
    rng = np.random.default_rng(0)
    # Every byte pair as likely as any other: sixteen bits, less what a finite sample lacks.
    values = rng.integers(0, 2**16, 200_000).astype(np.uint16).view(np.float16)
    assert 15.98 < byte_entropy(values) <= 16.0


def test_what_cannot_be_asked_together():
    with pytest.raises(ConfigError, match="outliers"):
        SparseConfig(outliers=0.1)
    with pytest.raises(ConfigError, match="mantissa_bits"):
        SparseConfig(method="block", mantissa_bits=2)
    with pytest.raises(ConfigError, match="weight_bits"):
        SparseConfig(method="block", weight_bits=8)
    with pytest.raises(ConfigError, match="two grids"):
        SparseConfig(mantissa_bits=2, weight_bits=8)
