"""The distillation losses in NumPy, float64: the definition both wings are tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slimkit.core.distill.config import LossTerm

Array = np.ndarray[Any, Any]
SMALLEST = 1e-16  # a square that is divided by is at least this
FAINT = 0.01  # rows near zero would otherwise count without bound
MASKED_SCORE = -1e4  # attention scores at or below it stand for masked positions
MASKED_KEY = -1e9  # added to the score of a padded key before the softmax


def log_softmax(x: Array) -> Array:
    """Logarithm of the softmax over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def row_mean(values: Array, mask: Array | None) -> float:
    """Mean over rows, or over the rows whose mask is 1; 0 where there is none."""
    if mask is None:
        return float(values.mean())
    mask = mask.reshape(values.shape)
    return float(np.where(mask > 0, values * mask, 0).sum() / max(mask.sum(), 1))


def blank(x: Array, mask: Array | None) -> Array:
    """Rows (..., width), 0 where the mask is 0: what padding holds, infinity and NaN too, then counts for nothing."""
    return x if mask is None else np.where(mask.reshape(x.shape[:-1])[..., None] > 0, x, 0)


def pairs_mean(values: Array, mask: Array | None) -> float:
    """Mean over pairs of positions (batch, length, length), or over those where both are real."""
    if mask is None:
        return float(values.mean())
    mask = mask.reshape(values.shape[0], -1)
    pairs = mask[:, :, None] * mask[:, None, :]
    return float(np.where(pairs > 0, values * pairs, 0).sum() / max(pairs.sum(), 1))


def places(x: Array) -> Array:
    """A map (batch, width, h, w) as (batch, h*w, width); anything else as it is."""
    return x if x.ndim != 4 else x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def pool(x: Array, how: str, mask: Array | None) -> Array:
    """(batch, length, width) -> (batch, width): the first position, or the mean of those whose mask is 1."""
    if how == "first":
        return x[:, 0]
    if mask is None:
        return np.asarray(x.mean(1))
    weight = mask[:, :, None]
    return np.asarray((blank(x, mask) * weight).sum(1) / np.maximum(weight.sum(1), 1))


def kd_cross_entropy(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean over rows of -sum p_t log p_s, logits divided by the temperature (Hinton et al. 2015, sec. 2)."""
    s, t = blank(s, mask), blank(t, mask)
    p = np.exp(log_softmax(t / term.temperature))
    return row_mean(-(p * log_softmax(s / term.temperature)).sum(-1), mask)


def kd_mse(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean squared difference of logits divided by the temperature (Ba & Caruana 2014)."""
    s, t = blank(s, mask), blank(t, mask)
    return row_mean((((s - t) / term.temperature) ** 2).mean(-1), mask)


def kd_kl_div(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean over rows of KL(teacher || student); its gradient is that of the cross entropy, its minimum 0."""
    s, t = blank(s, mask), blank(t, mask)
    log_t = log_softmax(t / term.temperature)
    return row_mean((np.exp(log_t) * (log_t - log_softmax(s / term.temperature))).sum(-1), mask)


def hard_kd_cross_entropy(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Cross entropy of the student against the teacher's most likely class."""
    s, t = blank(s, mask), blank(t, mask)
    chosen = t.argmax(-1)[..., None]
    return row_mean(-np.take_along_axis(log_softmax(s), chosen, -1)[..., 0], mask)


def hidden_mse(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean squared difference of hidden states (Romero et al. 2015, FitNets)."""
    s, t = blank(places(s), mask), blank(places(t), mask)
    return row_mean(((s - t) ** 2).mean(-1), mask)


def hidden_relative(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean over rows of |s - t|^2 / |t|^2: a share of the teacher's own size, whatever the scale of a layer or row.

    A row of the teacher smaller than FAINT of the mean square counts as if it had that.
    """
    s, t = blank(places(s), mask), blank(places(t), mask)
    size = (t**2).sum(-1)
    least = max(FAINT * row_mean(size, mask), SMALLEST)
    return row_mean(((s - t) ** 2).sum(-1) / np.maximum(size, least), mask)


def hidden_cosine(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean over rows of 1 - cosine of hidden states (Sanh et al. 2019, DistilBERT)."""
    s, t = blank(places(s), mask), blank(places(t), mask)
    square = [np.maximum((x**2).sum(-1), SMALLEST) for x in (s, t)]
    return row_mean(1 - (s * t).sum(-1) / np.sqrt(square[0]) / np.sqrt(square[1]), mask)


def states(x: Array, n_samples: int | None = None) -> Array:
    """Hidden states as (samples, places, width); (rows, width) is one sample, or n_samples of equal length."""
    x = places(x)
    return x if x.ndim == 3 else x.reshape(n_samples or 1, -1, x.shape[-1])


def mmd(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean squared difference of Gram matrices over width (Huang & Wang 2017, eq. 5 with a linear kernel)."""
    n = term.func_param[0] if term.func_param else None
    gram = [x @ x.swapaxes(1, 2) / x.shape[-1] for x in (blank(states(s, n), mask), blank(states(t, n), mask))]
    return pairs_mean((gram[0] - gram[1]) ** 2, mask)


def attention_mse(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """Mean squared difference of attention maps (Jiao et al. 2020, TinyBERT, eq. 7); heads averaged if unequal."""
    s, t = (np.where(x <= MASKED_SCORE, 0, x) for x in (s, t))
    if s.ndim == 3:
        s, t = s[:, None], t[:, None]
    if mask is not None:
        pairs = (mask[:, :, None] * mask[:, None, :])[:, None]
        s, t = (np.where(pairs > 0, x, 0) for x in (s, t))
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
    return pairs_mean(((s - t) ** 2).mean(1), mask)


def relation(s: Array, t: Array, term: LossTerm, mask: Array | None) -> float:
    """KL between the scaled dot-product relations of states (Wang et al. 2021, MiniLMv2, eq. 3 to 5)."""
    heads = term.func_param[0] if term.func_param else 1
    logs = []
    for x in (blank(states(s), mask), blank(states(t), mask)):
        x = x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # (samples, heads, places, width / heads)
        scores = x @ x.swapaxes(2, 3) / np.sqrt(x.shape[-1]) / term.temperature
        if mask is not None:
            scores = scores + (1 - mask.reshape(x.shape[0], 1, 1, -1)) * MASKED_KEY
        logs.append(log_softmax(scores))
    log_s, log_t = logs
    divergence = (np.exp(log_t) * (log_t - log_s)).sum(-1).mean(1)  # (samples, places)
    return row_mean(divergence, None if mask is None else mask.reshape(divergence.shape))


LOSSES: dict[str, Callable[[Array, Array, LossTerm, Array | None], float]] = {
    "KDCrossEntropy": kd_cross_entropy,
    "KDMse": kd_mse,
    "KDKLDiv": kd_kl_div,
    "HardKDCrossEntropy": hard_kd_cross_entropy,
    "HiddenMse": hidden_mse,
    "HiddenRelative": hidden_relative,
    "HiddenCosine": hidden_cosine,
    "MMD": mmd,
    "AttentionMse": attention_mse,
    "Relation": relation,
}


def reference(s: Array, t: Array, term: LossTerm, mask: Array | None = None) -> float:
    """The value of a built-in loss between student and teacher, without its weight.

    Args:
        s, t: the tensors, batch first.
        term: which loss and its parameters.
        mask: 1 on real positions, 0 on padding, of shape `s.shape[:-1]` (attention: (batch, length)).

    Returns:
        The loss in float64.

    Example:
        >>> reference(np.ones((2, 3)), np.zeros((2, 3)), LossTerm("HiddenMse", 1.0))
        1.0
    """
    s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
    return LOSSES[term.func_name](s, t, term, None if mask is None else np.asarray(mask, np.float64))
