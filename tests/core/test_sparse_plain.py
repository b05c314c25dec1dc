"""The fast forms of the sweep and of the choices do what the plain ones in `maths/plain.py` do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.sparse.maths import plain
from slimkit.core.sparse.maths import sweep as fast
from slimkit.core.sparse.maths.factor import inverse_factor
from slimkit.core.sparse.maths.pattern import LONG, NM, keep_all_but, keep_nm
from tests.conftest import INSTALLED

few = settings(max_examples=25, deadline=None)


def arrays():
    """The libraries that the text runs on: what makes an array of a NumPy one."""
    yield "numpy", lambda a: a.copy()
    if "torch" in INSTALLED:
        import torch

        yield "torch", lambda a: torch.from_numpy(a.copy())


LIBRARIES = dict(arrays())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("nm", [None, NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 5)], ids=str)
@pytest.mark.parametrize(("n", "out", "block"), [(40, 7, 8), (120, 5, 128), (200, 9, 64), (280, 3, 100)])
def test_the_sweep_is_the_published_one(library, nm, n, out, block):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((2 * n, n)) @ (np.eye(n) + 0.2 * rng.standard_normal((n, n)) / n**0.5)
    weight = rng.standard_normal((out, n))
    upper, _ = inverse_factor(x.T @ x / len(x), 0.01)
    for ratio in (0.3, 0.7):
        wanted, mask, loss = plain.sweep(weight, upper, ratio, nm, block)
        turned = LIBRARIES[library](np.ascontiguousarray(weight.T))
        kept, found = fast.sweep(turned, LIBRARIES[library](np.asarray(upper)), ratio, nm, block)
        np.testing.assert_array_equal(np.asarray(kept).T, mask)
        np.testing.assert_allclose(np.asarray(turned).T, wanted, atol=1e-10)  # float64, a few hundred terms
        np.testing.assert_allclose(found, loss, rtol=1e-10)


@pytest.mark.parametrize("library", LIBRARIES)
@few
@given(st.integers(1, 40), st.integers(1, 30), st.data())
def test_a_choice_of_the_smallest_is_the_plain_one(library, rows, columns, data):
    seed, coarse = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([2, 9, 10**6]))
    scores = np.random.default_rng(seed).integers(0, coarse, (rows, columns)).astype(np.float32)  # many ties, or none
    n_zeros = data.draw(st.integers(0, scores.size))
    found = np.asarray(keep_all_but(LIBRARIES[library](scores), n_zeros))
    np.testing.assert_array_equal(found, plain.keep_all_but(scores, n_zeros))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("coarse", [2, 50, 10**7])
def test_a_long_choice_is_the_plain_one(library, coarse):
    rng = np.random.default_rng(coarse)
    scores = rng.integers(0, coarse, (3, LONG // 2 + 11)).astype(np.float32)
    for order in (scores, np.sort(scores, axis=None).reshape(scores.shape)):  # a sample of sorted ones says most
        for n_zeros in (1, 999, scores.size // 2, scores.size - 1):
            found = np.asarray(keep_all_but(LIBRARIES[library](order), n_zeros))
            np.testing.assert_array_equal(found, plain.keep_all_but(order, n_zeros))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@few
@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_a_pattern_is_the_plain_one(library, dtype, rows, groups, data):
    nm = data.draw(st.sampled_from([NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    coarse = data.draw(st.sampled_from([2, 5, 10**6]))
    scores = rng.integers(0, coarse, (rows, groups * nm.group)).astype(dtype) * 64  # apart by more than four units
    found = np.asarray(keep_nm(LIBRARIES[library](scores), nm))
    np.testing.assert_array_equal(found, plain.keep_nm(scores, nm))
