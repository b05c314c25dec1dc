"""Swaps of kept and dropped weights: never worse, legal, and as good as trying every pair where all are candidates."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ConfigError
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse.maths import swaps
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.pattern import NM, keep_nm
from slimkit.core.sparse.maths.solve import solve


def problem(seed, rows=9, n=24):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n // 3)) @ rng.standard_normal((n // 3, n)) + 0.3 * rng.standard_normal((3 * n, n))
    return rng.standard_normal((rows, n)), x.T @ x / len(x), rng


def errors(target, weight, gram):
    return np.einsum("ij,jk,ik->i", target - weight, gram, target - weight)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("refits", [True, False])
@pytest.mark.parametrize("nm", [None, NM(2, 4), NM(1, 3)])
def test_no_row_gets_worse_and_every_mask_stays_legal(seed, refits, nm):
    target, gram, rng = problem(seed)
    scores = rng.random(target.shape)
    keep = keep_nm(scores, nm) if nm else scores > rng.random((len(target), 1))  # rows of any share, all or nothing too
    keep[0], keep[1] = (keep[0], keep[1]) if nm else (True, False)
    weight = target * keep
    new, mask, facts = swaps.swap(target, weight, keep, gram, nm, 40, refits)
    assert (errors(target, new, gram) <= errors(target, weight, gram) * (1 + 1e-9)).all()
    assert (mask.sum(1) == keep.sum(1)).all()
    assert ((new != 0) == mask).all()
    assert facts["swaps"] > 0 < facts["swaps_gain"] <= 1
    if nm:
        assert (mask.reshape(-1, nm.group).sum(1) == nm.keep).all()
    if not refits:
        np.testing.assert_array_equal(new, target * mask)


@pytest.mark.parametrize("refits", [True, False])
def test_in_the_end_no_pair_helps(refits, monkeypatch):
    monkeypatch.setattr(swaps, "CANDIDATES", 64)
    target, gram, rng = problem(3, rows=4)
    keep = rng.random(target.shape) > 0.5
    new, mask, _ = swaps.swap(target, target * keep, keep, gram, None, 500, refits)
    for row in range(len(target)):
        now = errors(target, new, gram)[row]
        for u in np.flatnonzero(mask[row]):
            for p in np.flatnonzero(~mask[row]):
                tried = new[row].copy()
                tried[u] = 0
                d = target[row] - tried
                tried[p] = (d @ gram)[p] / gram[p, p] if refits else target[row, p]
                d = target[row] - tried
                assert d @ gram @ d > now - 1e-6 * (target[row] @ gram @ target[row])


@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_layer_is_solved_with_swaps(method, pattern):
    rng = np.random.default_rng(0)
    layer = SparseLayer("fc", "linear", (12, 24))
    weight = rng.standard_normal((12, 24)).astype(np.float32)
    rows = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 24)) + 0.3 * rng.standard_normal((200, 24))
    rows[:, 5] = 0  # a column that is always zero has nothing to gain
    found = {}
    for most in (0, 30):
        moments = Moments(layer)
        moments.add(rows.astype(np.float32))
        found[most] = solve(layer, weight, moments, 0.5, SparseConfig(method=method, pattern=pattern, swaps=most))
    plain, swapped = found[0].account, found[30].account
    assert swapped["zeros"] == plain["zeros"] == 144
    assert swapped["swaps"] > 0 or method == "par"
    assert swapped["output_error"] < plain["output_error"] * (1.02 if method == "par" else 1)  # par's own is shrunk
    if pattern is None:
        assert not found[30].keep[:, 5].any()
    if method == "wanda":
        np.testing.assert_array_equal(found[30].weight, weight * found[30].keep)


def test_swaps_need_moments():
    with pytest.raises(ConfigError, match="swaps"):
        SparseConfig(method="magnitude", swaps=3)
