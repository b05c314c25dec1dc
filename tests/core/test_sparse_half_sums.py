"""The symmetric sum of which one half is made, of one process and of several that each keep a part."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse.maths import moments as room
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.ordered import OrderedSums

RNG = np.random.default_rng(0)


def added(found, calls):
    for rows in calls:
        found.add(*rows)
    return found


class Crew:
    """One process."""

    def processes(self):
        return 1

    def rank(self):
        return 0


@pytest.mark.parametrize("n", [1, 7, 8, 21])
@pytest.mark.parametrize("weighed", [None, True, False])
def test_half_of_the_products_make_the_whole_mean(n, weighed, monkeypatch):
    """Unpaired, paired with a weight of its own, and paired with dense products, which are made alike."""
    monkeypatch.setattr(room, "HALF_PANEL", 8)
    layer, weight = SparseLayer("l", "linear", (3, n)), RNG.standard_normal((3, n))
    calls = [[RNG.standard_normal((30, n)) for _ in range(1 if weighed is None else 2)] for _ in range(3)]
    apart, whole = (
        added(Moments(layer, weighed is not None, weight if weighed else None, apart=a), calls) for a in (True, False)
    )
    apart.average()
    whole.average()
    np.testing.assert_allclose(apart.gram, whole.gram, rtol=1e-12, atol=1e-14)  # float64, 90 terms
    for field in ("total", "cross", "missing", "dense_total"):
        assert (getattr(apart, field) is None) == (getattr(whole, field) is None)


def test_equal_rows_have_equal_products_to_the_bit():
    layer = SparseLayer("l", "linear", (40, 30))  # its target is then the weight itself
    rows = RNG.standard_normal((50, 30))
    found = added(Moments(layer, True, apart=True), [(rows, rows)])
    found.average()
    np.testing.assert_array_equal(found.gram, found.cross)


@pytest.mark.parametrize("n", [5, 8, 21])
def test_parts_put_together_are_the_sums_of_one_process(n, monkeypatch):
    monkeypatch.setattr(room, "HALF_PANEL", 8)
    layer = SparseLayer("l", "linear", (3, n))
    calls = [(RNG.standard_normal((30, n)),) for _ in range(4)]
    one = Moments(layer, apart=True)
    sums = OrderedSums(Crew(), {"l": one})
    for rows in calls:
        sums.add("l", *rows)
        sums.ended()
    # What processes do: each call by itself, its parts added in order, the parts put together.
    parts = [Moments(layer, apart=True) for _ in range(2)]
    for rows in calls:
        call = added(one.alike(), [rows])
        for rank, part in enumerate(parts):
            pieces = {}
            for field in call.facts()["has"]:
                flat = call.flat(field)
                assert len(flat) == call.flat_size(field)
                half = len(flat) // 2
                pieces[field] = flat[half:] if rank else flat[:half]
            part.fold(call.facts(), pieces)
    together = Moments(layer, apart=True)
    for field in ("gram", "total"):
        together.take(field, np.concatenate([getattr(part, field) for part in parts]))
    together.count = one.count
    one.average()
    together.average()
    np.testing.assert_array_equal(together.gram, one.gram)
    np.testing.assert_allclose(one.gram, one.gram.transpose(0, 2, 1), rtol=1e-12)
    assert one.gram.any()
