"""What one window says of a language model, token by token, and how far it is from the dense model's answer.

For logits z of a token that is predicted, with log q = z - lse(z), lse the logarithm of the sum of exponentials, and y
the dense model's logits:

    loss      lse(z) - z[next token]                               nats
    KL        sum_v p[v] (y[v] - z[v]) - lse(y) + lse(z)           p = exp(y - lse(y)), nats
    KL, top k sum over the dense model's k likeliest tokens, and all others as one: never above the exact KL
              (data-processing inequality; Cover & Thomas, Elements of Information Theory, section 2.8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Rows of logits that are looked at together: 8 rows of 50,000 tokens are 1.6 MB, which stays in the processor's cache.
ROWS = 8


@dataclass(frozen=True)
class TokenScores:
    """What one model says of one window; every array has one entry a predicted token.

    Args:
        loss: negative log-likelihood of the token, nats, float64.
        correct: whether the likeliest token is the right one.
        likeliest: the likeliest token.
        kl: KL divergence of the dense model from this one, nats; None for the dense model itself.
    """

    loss: Array
    correct: Array
    likeliest: Array
    kl: Array | None = None


@dataclass(frozen=True)
class DenseAnswer:
    """What is kept of the dense model's logits of one window, for the KL divergence.

    Args:
        kept: (tokens, kept): log-probabilities in float32, or the logits themselves where all are kept.
        places: (tokens, kept) int32, which tokens they are; None where all are kept, in order.
        lse: (tokens,) float64, what the logits' exponentials sum up to, as logarithm.
    """

    kept: Array
    places: Array | None
    lse: Array


def log_softmax(logits: Array) -> Array:
    """Log-probabilities (rows, vocabulary), in float32 or float64 as the logits are; sums are float64.

    Example:
        >>> float(np.exp(log_softmax(np.array([[0.0, 5.0, 2.0]]))).sum().round(9))
        1.0
    """
    wide = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float32)
    shifted = wide - wide.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))
    shifted -= total.astype(shifted.dtype)
    return shifted


def score(
    logits: Array, ids: Array, dense: DenseAnswer | None = None, keep: int | None = None
) -> tuple[TokenScores, DenseAnswer | None]:
    """Score a window.

    Args:
        logits: (length, vocabulary); row i predicts token i + 1.
        ids: (length,) the window's tokens.
        dense: the dense model's answer, to measure the distance from.
        keep: how many of the likeliest tokens' log-probabilities to return; 0 for all; None for no answer.

    Returns:
        The scores, and the answer when `keep` is given.

    Example:
        >>> scores, _ = score(np.log(np.array([[0.25, 0.75], [0.5, 0.5]])), np.array([0, 1]))
        >>> float(np.exp(-scores.loss[0]).round(9)), bool(scores.correct[0])
        (0.75, True)
    """
    targets = ids[1:]
    n = len(targets)
    loss, likeliest, lse = np.empty(n), np.empty(n, np.int64), np.empty(n)
    kl = None if dense is None else np.empty(n)
    tops: list[tuple[Array, Array]] = []
    room = np.empty((2, min(ROWS, n), logits.shape[-1]), logits.dtype if _plain(logits) else np.float32)
    for begin in range(0, n, ROWS):
        rows = slice(begin, min(begin + ROWS, n))
        z = logits[rows] if _plain(logits) else logits[rows].astype(np.float32)  # (rows, vocabulary)
        spare, other = room[:, : len(z)]
        likeliest[rows] = z.argmax(-1)
        lse[rows] = _lse(z, likeliest[rows], spare)
        loss[rows] = lse[rows] - _at(z, targets[rows])
        if kl is not None and dense is not None:
            kl[rows] = _divergence(dense, rows, z, lse[rows], spare, other)
        if keep and keep < logits.shape[-1]:
            tops.append(_top(z, keep, lse[rows]))
    answer = None
    if keep is not None and not 0 < keep < logits.shape[-1]:
        answer = DenseAnswer(logits[:n], None, lse)
    elif keep is not None:
        kept, places = (np.concatenate(part) for part in zip(*tops, strict=True))
        answer = DenseAnswer(kept, places, lse)
    return TokenScores(loss, likeliest == targets, likeliest, kl), answer


def _plain(logits: Array) -> bool:
    """Whether NumPy calculates with the type as it is: bfloat16 and float16 are widened."""
    return logits.dtype in (np.float32, np.float64)


def _at(z: Array, places: Array) -> Array:
    found: Array = z[np.arange(len(z)), places].astype(np.float64)
    return found


def _lse(z: Array, likeliest: Array, spare: Array) -> Array:
    """The logarithm of the sum of exponentials of each row, (rows,) float64; `spare` (rows, vocabulary) is used up."""
    most = z[np.arange(len(z)), likeliest]  # (rows,)
    np.subtract(z, most[:, None], out=spare)
    np.exp(spare, out=spare)
    # Along an axis that is contiguous NumPy adds in pairs: float32 loses a few units in its last place.
    total: Array = most.astype(np.float64) + np.log(spare.sum(-1).astype(np.float64))
    return total


def _top(z: Array, keep: int, lse: Array) -> tuple[Array, Array]:
    """The likeliest tokens' log-probabilities and which they are, (rows, keep) each, in no order.

    The largest of each of `keep` pieces of a row are `keep` values, so the smallest of them is a floor below which none
    of the `keep` largest lies; few more stand above it, and only those are sorted out.
    """
    size = z.shape[-1] // keep
    floor = z[:, : size * keep].reshape(len(z), keep, size).max(-1).min(-1)  # (rows,)
    places = np.empty((len(z), keep), np.int32)
    for row, (values, least) in enumerate(zip(z, floor, strict=True)):
        above = np.flatnonzero(values >= least)
        places[row] = above[np.argpartition(values[above], len(above) - keep)[-keep:]]
    return (np.take_along_axis(z, places, -1) - lse[:, None]).astype(np.float32), places


def _divergence(dense: DenseAnswer, rows: slice, z: Array, lse: Array, spare: Array, other: Array) -> Array:
    """KL(dense || this) of each row, (rows,) float64; `spare` and `other` (rows, vocabulary) are used up."""
    if dense.places is None:
        y = dense.kept[rows]
        # Each from its own largest, and the middle of the differences taken out: a shift of all logits rounds nothing.
        tops = [a.max(-1).astype(np.float64) for a in (y, z)]
        whole, own = dense.lse[rows] - tops[0], lse - tops[1]
        with np.errstate(invalid="ignore"):  # -inf - -inf, below
            np.subtract(y, tops[0][:, None].astype(spare.dtype), out=spare, casting="same_kind")
            np.subtract(z, tops[1][:, None].astype(other.dtype), out=other, casting="same_kind")
            np.subtract(spare, other, out=other)
            other -= (whole - own)[:, None].astype(other.dtype)  # log p - log q
            np.exp(spare, out=spare)
            spare *= other
            total: Array = spare.sum(-1).astype(np.float64) / np.exp(whole)
            for row in np.flatnonzero(~np.isfinite(total)):  # what the dense model rules out (-inf) adds nothing
                log_p = y[row].astype(np.float64) - dense.lse[rows][row]
                p = np.exp(log_p)
                total[row] = float(np.sum(np.where(p > 0, p * (log_p - z[row] + lse[row]), 0.0)))
        return total
    log_p = dense.kept[rows].astype(np.float64)  # (rows, kept)
    log_q = np.take_along_axis(z, dense.places[rows].astype(np.int64), -1).astype(np.float64) - lse[:, None]
    p = np.exp(log_p)
    rest_p = np.clip(1.0 - p.sum(-1), 0.0, None)
    rest_q = np.clip(1.0 - np.exp(log_q).sum(-1), 1e-300, None)
    tail = np.where(rest_p > 0, rest_p * (np.log(np.maximum(rest_p, 1e-300)) - np.log(rest_q)), 0.0)
    return (p * (log_p - log_q)).sum(-1) + tail
