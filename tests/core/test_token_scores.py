"""Losses and divergences of windows: those of plain formulas in float64."""

import numpy as np
import pytest

from slimkit.core.compare.scores import score


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("keep", [0, 5, 40, 400])
def test_scores_are_those_of_plain_formulas(dtype, keep):
    """Against log-softmax in float64, with logits far from zero, unequal shifts and tokens that the model rules out."""
    rng = np.random.default_rng(3)
    y = (6 * rng.standard_normal((23, 333)) + 30).astype(dtype)
    z = (y.astype(np.float64) + 0.3 * rng.standard_normal(y.shape) - 50).astype(dtype)
    y[5, 17] = z[5, 17] = -np.inf
    ids = rng.integers(0, 333, 23)

    def logs(a):
        a = a[:-1].astype(np.float64)
        return a - np.log(np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True)) - a.max(-1, keepdims=True)

    p, q = logs(y), logs(z)
    first, answer = score(y, ids, keep=keep)
    second, _ = score(z, ids, answer)
    rows = np.arange(22)
    np.testing.assert_allclose(first.loss, -p[rows, ids[1:]], rtol=3e-6)
    np.testing.assert_array_equal(second.likeliest, q.argmax(-1))
    np.testing.assert_array_equal(second.correct, q.argmax(-1) == ids[1:])
    with np.errstate(invalid="ignore"):
        exact = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(-1)
    if keep in (0, 400):
        np.testing.assert_allclose(second.kl, exact, rtol=1e-4, atol=1e-6)
        return
    chosen = np.argsort(p, -1)[:, -keep:]  # the tail as one
    top_p, top_q = (np.take_along_axis(a, chosen, -1) for a in (p, q))
    rest_p, rest_q = (1 - np.exp(a).sum(-1) for a in (top_p, top_q))
    wanted = (np.exp(top_p) * (top_p - top_q)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    # Equal logits at the edge of the kept ones are either in or out.
    np.testing.assert_allclose(second.kl, wanted, rtol=1e-4, atol=1e-5 if dtype == np.float16 else 2e-6)
    assert np.all(second.kl <= exact + 1e-6)


def test_a_model_is_no_distance_from_itself():
    z = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    ids = np.arange(9)
    _, answer = score(z, ids, keep=0)
    assert np.array_equal(score(z, ids, answer)[0].kl, np.zeros(8))
