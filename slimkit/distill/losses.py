"""The distillation losses for PyTorch; slimkit.core.distill.losses defines them, these must agree to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.core.distill.config import LossTerm
from slimkit.core.distill.losses import FAINT, MASKED_KEY, MASKED_SCORE, SMALLEST

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

Loss: TypeAlias = Callable[[Tensor, Tensor, LossTerm, "Tensor | None"], Tensor]


def row_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over rows, or over the rows whose mask is 1; 0 where there is none."""
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape)
    return torch.where(mask > 0, values * mask, 0).sum() / mask.sum().clamp(min=1)


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (..., width), 0 where the mask is 0: what padding holds, infinity and NaN too, then counts for nothing."""
    return x if mask is None else torch.where(mask.reshape(x.shape[:-1]).unsqueeze(-1) > 0, x, 0)


def places(x: Tensor) -> Tensor:
    """A map (batch, width, h, w) as (batch, h*w, width); anything else as it is."""
    return x if x.ndim != 4 else x.flatten(2).transpose(1, 2)


def pool(x: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """(batch, length, width) -> (batch, width)."""
    if how == "first":
        return x[:, 0]
    if mask is None:
        return x.mean(1)
    weight = mask[:, :, None]
    return (blank(x, mask) * weight).sum(1) / weight.sum(1).clamp(min=1)


def kd_cross_entropy(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """-sum p_t log p_s."""
    s, t = blank(s, mask), blank(t, mask)
    p = softmax(t / term.temperature, -1)
    return row_mean(-(p * log_softmax(s / term.temperature, -1)).sum(-1), mask)


def kd_mse(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Squared difference of logits."""
    s, t = blank(s, mask), blank(t, mask)
    return row_mean(((s - t) / term.temperature).square().mean(-1), mask)


def kd_kl_div(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """KL(teacher || student)."""
    s, t = blank(s, mask), blank(t, mask)
    log_t = log_softmax(t / term.temperature, -1)
    return row_mean((log_t.exp() * (log_t - log_softmax(s / term.temperature, -1))).sum(-1), mask)


def hard_kd_cross_entropy(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Cross entropy against the teacher's most likely class."""
    s, t = blank(s, mask), blank(t, mask)
    return row_mean(-log_softmax(s, -1).gather(-1, t.argmax(-1, keepdim=True)).squeeze(-1), mask)


def hidden_mse(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Squared difference of hidden states."""
    if mask is None:
        return torch.nn.functional.mse_loss(places(s), places(t))
    return row_mean((blank(places(s), mask) - blank(places(t), mask)).square().mean(-1), mask)


def hidden_relative(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Squared difference of hidden states as a share of the teacher's squares, row by row."""
    s, t = blank(places(s), mask), blank(places(t), mask)
    size = t.square().sum(-1)
    least = (FAINT * row_mean(size, mask)).clamp(min=SMALLEST)
    return row_mean((s - t).square().sum(-1) / torch.maximum(size, least), mask)


def hidden_cosine(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """1 - cosine of hidden states."""
    s, t = blank(places(s), mask), blank(places(t), mask)
    lengths = [x.square().sum(-1).clamp(min=SMALLEST).sqrt() for x in (s, t)]
    return row_mean(1 - (s * t).sum(-1) / lengths[0] / lengths[1], mask)


def states(x: Tensor, n_samples: int | None = None) -> Tensor:
    """Hidden states as (samples, places, width)."""
    x = places(x)
    return x if x.ndim == 3 else x.reshape(n_samples or 1, -1, x.shape[-1])


def _pairs_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape[0], -1)
    pairs = mask[:, :, None] * mask[:, None, :]
    return torch.where(pairs > 0, values * pairs, 0).sum() / pairs.sum().clamp(min=1)


def mmd(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Squared difference of Gram matrices over width."""
    n = term.func_param[0] if term.func_param else None
    gram_s, gram_t = (
        x @ x.transpose(1, 2) / x.shape[-1] for x in (blank(states(s, n), mask), blank(states(t, n), mask))
    )
    return _pairs_mean((gram_s - gram_t).square(), mask)


def attention_mse(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """Squared difference of attention maps."""
    s, t = (torch.where(x <= MASKED_SCORE, torch.zeros_like(x), x) for x in (s, t))
    if s.ndim == 3:
        s, t = s[:, None], t[:, None]
    if mask is not None:
        pairs = (mask[:, :, None] * mask[:, None, :])[:, None]
        s, t = (torch.where(pairs > 0, x, 0) for x in (s, t))
    if s.shape[1] != t.shape[1]:
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    return _pairs_mean((s - t).square().mean(1), mask)


def relation(s: Tensor, t: Tensor, term: LossTerm, mask: Tensor | None) -> Tensor:
    """KL between the scaled dot-product relations of states."""
    heads = term.func_param[0] if term.func_param else 1
    logs = []
    for x in (blank(states(s), mask), blank(states(t), mask)):
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (samples, heads, places, width / heads)
        scores = x @ x.transpose(2, 3) / (x.shape[-1] ** 0.5 * term.temperature)
        if mask is not None:
            scores = scores + (1 - mask.reshape(x.shape[0], 1, 1, -1)) * MASKED_KEY
        logs.append(log_softmax(scores, -1))
    log_s, log_t = logs
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1).mean(1)  # (samples, places)
    return row_mean(divergence, None if mask is None else mask.reshape(divergence.shape))


LOSSES: dict[str, Loss] = {
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
