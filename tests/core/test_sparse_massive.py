"""Massive activations: a few rows of enormous inputs do not decide alone what the weights become."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import LONGEST, Moments
from slimkit.core.sparse.maths.solve import solve

RNG = np.random.default_rng(3)
N = 24
LAYER = SparseLayer("down", "linear", (N, N))


def moments(rows, dense, paired=True, calls=4):
    found = Moments(LAYER, paired)
    for x, y in zip(np.split(rows, calls), np.split(dense, calls), strict=True):
        found.add(x, y if paired else None)
    return found


def ordinary(rows=256):
    return RNG.standard_normal((rows, N)) @ RNG.standard_normal((N, N)) / N**0.5


def test_a_row_counts_as_no_longer_than_its_call_allows():
    x = ordinary()
    x[::64] *= 1000
    found = moments(x, x + 0.1)
    wanted = np.zeros((N, N))
    for part in np.split(x, 4):
        lengths = np.linalg.norm(part + 0.1, axis=1)
        longest = LONGEST * np.sort(lengths)[len(lengths) // 2]
        part = part * np.minimum(1, longest / lengths)[:, None]
        wanted += part.T @ part
    np.testing.assert_allclose(found.gram[0], wanted, rtol=1e-10)
    assert found.count == len(x)


@pytest.mark.parametrize(
    "rows", [ordinary() + 3, np.zeros((256, N)), np.where(np.arange(256)[:, None] % 8, 0, 1.0) * ordinary()]
)
def test_rows_of_like_length_and_zeros_count_as_they_are(rows):
    np.testing.assert_array_equal(moments(rows, rows).gram[0], sum(p.T @ p for p in np.split(rows, 4)))


def test_methods_that_follow_a_paper_see_every_row_as_it_is():
    """hessian is SparseGPT to the digit, massive activations or not."""
    x = ordinary()
    x[::64] *= 1000
    np.testing.assert_allclose(moments(x, x, paired=False).gram[0], x.T @ x, rtol=1e-10)


def test_what_is_not_finite_is_still_refused():
    x = ordinary()
    x[5, 2] = np.inf
    with pytest.raises(ValueError, match="finite"), np.errstate(invalid="ignore"):
        moments(x, x).check_finite()


def test_ordinary_rows_keep_what_they_ask_for(monkeypatch):
    """Fitted to what the dense model said, with its inputs drifted: the massive rows' drift is not all that counts."""
    weight = RNG.standard_normal((N, N))
    dense = ordinary(1024)
    dense[::256] = RNG.standard_normal(N) * 2000
    given = dense + 0.1 * RNG.standard_normal(dense.shape) * np.linalg.norm(dense, axis=1, keepdims=True) / N**0.5
    fresh = ordinary()
    config, losses = SparseConfig(method="par", pattern="2:4"), []
    for longest in (LONGEST, 1e9):
        monkeypatch.setattr("slimkit.core.sparse.maths.moments.LONGEST", longest)
        solved = solve(LAYER, weight, moments(given, dense), 0.5, config)
        losses.append(float(np.square(fresh @ (solved.weight - weight).T).mean()))
    assert losses[0] < 0.8 * losses[1]
