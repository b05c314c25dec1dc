"""What a layer's row counts: all groups of a convolution, zeros that rounding made, no polish by few rows."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths.grid import FloatGrid
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.solve import solve

GROUPS = 3


def convolution(seed=0):
    """A convolution of three groups on inputs that resemble each other, and the rows of each group."""
    rng = np.random.default_rng(seed)
    layer = SparseLayer("conv", "conv2d", (GROUPS * 4, 4, 2, 2), groups=GROUPS)
    mixed = rng.standard_normal((6, 3, 5, 5)).transpose(0, 2, 3, 1) @ rng.standard_normal((3, GROUPS * 4))
    x = mixed.transpose(0, 3, 1, 2) + 0.3 * rng.standard_normal((6, GROUPS * 4, 5, 5))
    weight = rng.standard_normal(layer.shape)
    return layer, weight, x, np.concatenate(list(layer.rows(x)), axis=1)


def solved(layer, weight, x, **more):
    moments = Moments(layer)
    moments.add(x)
    return solve(layer, weight, moments, 0.5, SparseConfig(sparse_ratio=0.5, **more))


@pytest.mark.parametrize(
    "more", [{"swaps": 9}, {"mantissa_bits": 1}, {"weight_bits": 3}, {"swaps": 9, "weight_bits": 3}]
)
@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
def test_a_row_tells_of_all_groups(method, more):
    layer, weight, x, rows = convolution()
    told = solved(layer, weight, x, method=method, **more).account
    matrix = layer.to_matrix(weight)
    alone = [
        solved(SparseLayer("fc", "linear", matrix[g].shape), matrix[g], rows[g], method=method, **more).account
        for g in range(GROUPS)
    ]
    counts = [key for key in ("swaps", "rounded_to_zero", "zeros") if key in told]
    assert {key: told[key] for key in counts} == {key: sum(one[key] for one in alone) for key in counts}
    for key in ("swaps_gain", "rounding_gain"):
        if key in told:  # between those of the groups, which differ
            found = [one[key] for one in alone]
            assert min(found) < told[key] < max(found)
    assert not [key for key in told if key.endswith("_error") and key != "output_error"]


@pytest.mark.parametrize("shape", [(12, 1, 3, 3), (40, 1, 1, 1)])
def test_outliers_are_a_share_of_the_layer_and_not_of_each_small_group(shape):
    rng = np.random.default_rng(1)
    layer = SparseLayer("depthwise", "conv2d", shape, groups=shape[0])
    weight, x = rng.standard_normal(shape), rng.standard_normal((4, shape[0], 5, 5))
    found = solved(layer, weight, x, method="par", mantissa_bits=1, outliers=0.1)
    kept = int(np.count_nonzero(found.keep))
    assert found.account["outliers"] == int(0.1 * kept) > 0
    off = np.count_nonzero(FloatGrid(1).nearest(found.weight) != found.weight)
    assert off <= found.account["outliers"]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "hessian", "par"])
def test_zeros_that_a_grid_makes_are_counted_and_stand_in_the_mask(method, pattern, bits):
    rng = np.random.default_rng(2)
    layer, weight = SparseLayer("fc", "linear", (16, 32)), rng.standard_normal((16, 32))
    found = solved(layer, weight, rng.standard_normal((300, 32)), method=method, pattern=pattern, weight_bits=bits)
    told = found.account
    assert np.array_equal(found.weight != 0, found.keep)
    assert told["zeros"] == np.count_nonzero(found.weight == 0) == 256 + told["rounded_to_zero"]
    assert told["ratio"] == told["zeros"] / weight.size
    assert told["rounded_to_zero"] > 0 or bits > 2


@pytest.mark.parametrize("more", [{"swaps": 9}, {"swaps": 9, "mantissa_bits": 1}, {"weight_bits": 3}])
def test_too_few_rows_polish_nothing(more):
    rng = np.random.default_rng(3)
    layer, weight = SparseLayer("fc", "linear", (8, 32)), rng.standard_normal((8, 32))
    few = solved(layer, weight, rng.standard_normal((5, 32)), method="par", **more)
    rounding = {key: value for key, value in more.items() if key != "swaps"}
    plain = solve(layer, weight, None, 0.5, SparseConfig(method="magnitude", **rounding))
    assert "fewer" in few.account["fallback"]
    assert not {"swaps", "rounding_gain"} & set(few.account)
    np.testing.assert_array_equal(few.weight, plain.weight)
