"""What one window says of a language model, token by token, and how far it is from the dense model's answer.

For logits z of a token that is predicted, with log q = z - logsumexp(z):

    loss      -log q[next token]                                   nats
    KL        sum_v p[v] (log p[v] - log q[v])                     p the dense model's, nats
    KL, top k sum over the dense model's k likeliest tokens, and all others as one: never above the exact KL
              (data-processing inequality; Cover & Thomas, Elements of Information Theory, section 2.8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Rows of logits that are looked at together: 64 rows of 50,000 tokens are 12 MB, which stays near the processor.
ROWS = 64


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
        log_p: (tokens, kept) float32 log-probabilities.
        places: (tokens, kept) int32, which tokens they are; None where all are kept in order.
    """

    log_p: Array
    places: Array | None


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
    loss, likeliest = np.empty(n), np.empty(n, np.int64)
    kl = None if dense is None else np.empty(n)
    kept: list[Array] = []
    places: list[Array] = []
    for begin in range(0, n, ROWS):
        rows = slice(begin, min(begin + ROWS, n))
        log_q = log_softmax(logits[rows])  # (rows, vocabulary)
        loss[rows] = -np.take_along_axis(log_q, targets[rows, None], -1)[:, 0]
        likeliest[rows] = log_q.argmax(-1)
        if kl is not None and dense is not None:
            kl[rows] = _divergence(dense, rows, log_q)
        if keep is not None:
            _keep(log_q, keep, kept, places)
    answer = None
    if keep is not None:
        answer = DenseAnswer(np.concatenate(kept), np.concatenate(places) if places else None)
    return TokenScores(loss, likeliest == targets, likeliest, kl), answer


def _keep(log_p: Array, keep: int, kept: list[Array], places: list[Array]) -> None:
    if not 0 < keep < log_p.shape[-1]:
        kept.append(log_p.astype(np.float32))
        return
    top = np.argpartition(log_p, log_p.shape[-1] - keep, axis=-1)[:, -keep:].astype(np.int32)
    places.append(top)
    kept.append(np.take_along_axis(log_p, top, -1).astype(np.float32))


def _divergence(dense: DenseAnswer, rows: slice, log_q: Array) -> Array:
    log_p = dense.log_p[rows]
    if dense.places is None:
        return (np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float64)
    log_p = log_p.astype(np.float64)
    log_q = np.take_along_axis(log_q, dense.places[rows].astype(np.int64), -1).astype(np.float64)
    p = np.exp(log_p)
    rest_p = np.clip(1.0 - p.sum(-1), 0.0, None)
    rest_q = np.clip(1.0 - np.exp(log_q).sum(-1), 1e-300, None)
    tail = np.where(rest_p > 0, rest_p * (np.log(np.maximum(rest_p, 1e-300)) - np.log(rest_q)), 0.0)
    return (p * (log_p - log_q)).sum(-1) + tail
