"""The distillation losses for MindSpore; slimkit.core.distill.losses defines them, these must agree to 1e-5."""

from __future__ import annotations

from typing import Any

from slimkit.core.distill.config import LOSSES as KINDS
from slimkit.core.distill.config import LossTerm
from slimkit.core.distill.losses import FAINT, MASKED_KEY, MASKED_SCORE, SMALLEST
from slimkit.core.distill.masks import IGNORED, names_labels
from slimkit_ms import bridge  # noqa: F401  (says in one line that MindSpore is missing)

import mindspore as ms
from mindspore import nn, ops

# Each construct is what the graph compiler reads: plain operators, None for "no mask" decided at compile time.


def row_mean(values: Any, mask: Any) -> Any:
    """Mean over rows, or over the rows whose mask is 1; 0 where there is none."""
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape)
    return ops.select(mask > 0, values * mask, ops.zeros_like(values)).sum() / ops.maximum(mask.sum(), 1.0)


def blank(x: Any, mask: Any) -> Any:
    """Rows (..., width), 0 where the mask is 0: what padding holds, infinity and NaN too, then counts for nothing."""
    if mask is None:
        return x
    keep = mask.reshape(x.shape[:-1]).expand_dims(-1).broadcast_to(x.shape) > 0
    return ops.select(keep, x, ops.zeros_like(x))


def places(x: Any) -> Any:
    """A map (batch, width, h, w) as (batch, h*w, width); anything else as it is."""
    if x.ndim != 4:
        return x
    return x.reshape((x.shape[0], x.shape[1], -1)).swapaxes(1, 2)


def pool(x: Any, how: str, mask: Any) -> Any:
    """(batch, length, width) -> (batch, width)."""
    if how == "first":
        return x[:, 0]
    if mask is None:
        return x.mean(1)
    weight = mask.expand_dims(2)
    return (blank(x, mask) * weight).sum(1) / ops.maximum(weight.sum(1), 1.0)


def states(x: Any, n_samples: int) -> Any:
    """Hidden states as (samples, places, width)."""
    x = places(x)
    if x.ndim == 3:
        return x
    return x.reshape((n_samples, -1, x.shape[-1]))


def pairs_mean(values: Any, mask: Any) -> Any:
    """Mean over pairs of positions, or over those where both are real."""
    if mask is None:
        return values.mean()
    mask = mask.reshape((values.shape[0], -1))
    pairs = mask.expand_dims(2) * mask.expand_dims(1)
    return ops.select(pairs > 0, values * pairs, ops.zeros_like(values)).sum() / ops.maximum(pairs.sum(), 1.0)


class Loss(nn.Cell):
    """One loss with its temperature and parameter as constants of the graph."""

    def __init__(self, term: LossTerm) -> None:
        super().__init__()
        self.temperature = float(term.temperature)
        self.parameter = int(term.func_param[0]) if term.func_param else 1


class KDCrossEntropy(Loss):
    """-sum p_t log p_s."""

    def construct(self, s, t, mask):
        s = blank(s, mask)
        p = ops.softmax(blank(t, mask) / self.temperature, -1)
        return row_mean(-(p * ops.log_softmax(s / self.temperature, -1)).sum(-1), mask)


class KDMse(Loss):
    """Squared difference of logits."""

    def construct(self, s, t, mask):
        return row_mean(ops.square((blank(s, mask) - blank(t, mask)) / self.temperature).mean(-1), mask)


class KDKLDiv(Loss):
    """KL(teacher || student)."""

    def construct(self, s, t, mask):
        s = blank(s, mask)
        log_t = ops.log_softmax(blank(t, mask) / self.temperature, -1)
        return row_mean((ops.exp(log_t) * (log_t - ops.log_softmax(s / self.temperature, -1))).sum(-1), mask)


class HardKDCrossEntropy(Loss):
    """Cross entropy against the teacher's most likely class."""

    def construct(self, s, t, mask):
        s = blank(s, mask)
        chosen = ops.argmax(blank(t, mask), -1).expand_dims(-1)
        return row_mean(-ops.gather_elements(ops.log_softmax(s, -1), -1, chosen).squeeze(-1), mask)


class HiddenMse(Loss):
    """Squared difference of hidden states."""

    def construct(self, s, t, mask):
        return row_mean(ops.square(blank(places(s), mask) - blank(places(t), mask)).mean(-1), mask)


class HiddenRelative(Loss):
    """Squared difference of hidden states as a share of the teacher's squares, row by row."""

    def construct(self, s, t, mask):
        s = blank(places(s), mask)
        t = blank(places(t), mask)
        size = ops.square(t).sum(-1)
        least = ops.maximum(FAINT * row_mean(size, mask), SMALLEST)
        return row_mean(ops.square(s - t).sum(-1) / ops.maximum(size, least), mask)


class HiddenCosine(Loss):
    """1 - cosine of hidden states."""

    def construct(self, s, t, mask):
        s = blank(places(s), mask)
        t = blank(places(t), mask)
        length_s = ops.sqrt(ops.maximum(ops.square(s).sum(-1), SMALLEST))
        length_t = ops.sqrt(ops.maximum(ops.square(t).sum(-1), SMALLEST))
        return row_mean(1.0 - (s * t).sum(-1) / length_s / length_t, mask)


class MMD(Loss):
    """Squared difference of Gram matrices over width."""

    def construct(self, s, t, mask):
        s = blank(states(s, self.parameter), mask)
        t = blank(states(t, self.parameter), mask)
        gram_s = ops.bmm(s, s.swapaxes(1, 2)) / s.shape[-1]
        gram_t = ops.bmm(t, t.swapaxes(1, 2)) / t.shape[-1]
        return pairs_mean(ops.square(gram_s - gram_t), mask)


class AttentionMse(Loss):
    """Squared difference of attention maps."""

    def construct(self, s, t, mask):
        s = ops.select(s <= MASKED_SCORE, ops.zeros_like(s), s)
        t = ops.select(t <= MASKED_SCORE, ops.zeros_like(t), t)
        if s.ndim == 3:
            s = s.expand_dims(1)
            t = t.expand_dims(1)
        if mask is not None:
            pairs = (mask.expand_dims(2) * mask.expand_dims(1)).expand_dims(1)
            s = ops.select(pairs.broadcast_to(s.shape) > 0, s, ops.zeros_like(s))
            t = ops.select(pairs.broadcast_to(t.shape) > 0, t, ops.zeros_like(t))
        if s.shape[1] != t.shape[1]:
            s = s.mean(1, keep_dims=True)
            t = t.mean(1, keep_dims=True)
        return pairs_mean(ops.square(s - t).mean(1), mask)


class Relation(Loss):
    """KL between the scaled dot-product relations of states."""

    def relations(self, x, mask):
        """Logarithms of the relations, (samples, heads, places, places)."""
        x = blank(states(x, 1), mask)
        width = x.shape[2] // self.parameter
        x = x.reshape((x.shape[0], x.shape[1], self.parameter, width)).swapaxes(1, 2)
        scores = ops.matmul(x, x.swapaxes(2, 3)) / (float(width) ** 0.5 * self.temperature)
        if mask is not None:
            scores = scores + (1.0 - mask.reshape((x.shape[0], 1, 1, -1))) * MASKED_KEY
        return ops.log_softmax(scores, -1)

    def construct(self, s, t, mask):
        log_s = self.relations(s, mask)
        log_t = self.relations(t, mask)
        divergence = (ops.exp(log_t) * (log_t - log_s)).sum(-1).mean(1)
        if mask is not None:
            mask = mask.reshape(divergence.shape)
        return row_mean(divergence, mask)


LOSSES: dict[str, type[Loss]] = {
    kind.__name__: kind
    for kind in (
        KDCrossEntropy,
        KDMse,
        KDKLDiv,
        HardKDCrossEntropy,
        HiddenMse,
        HiddenRelative,
        HiddenCosine,
        MMD,
        AttentionMse,
        Relation,
    )
}


class BuiltIn(nn.Cell):
    """A built-in loss, through the projection when the label has one."""

    def __init__(self, term: LossTerm) -> None:
        super().__init__(auto_prefix=False)
        self.loss = LOSSES[term.func_name](term)
        self.may_project = KINDS[term.func_name][0] == "hidden"
        self.projects = False

    def construct(self, s, t, mask, projection):
        if self.projects:
            return self.loss(ops.matmul(places(s), projection.swapaxes(0, 1)), places(t), mask)
        return self.loss(s, t, mask)


class Custom(nn.Cell):
    """A user's loss, with a mask only if there is one."""

    def __init__(self, loss: nn.Cell, term: LossTerm) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.may_project = self.projects = False
        self.temperature = float(term.temperature)
        self.tempered = term.temperature != 1

    def construct(self, s, t, mask, projection):
        if self.tempered and mask is None:
            return self.loss(s, t, temperature=self.temperature)
        if self.tempered:
            return self.loss(s, t, temperature=self.temperature, mask=mask)
        if mask is None:
            return self.loss(s, t)
        return self.loss(s, t, mask=mask)


class Terms(nn.Cell):
    """All losses of one soft label: (student, teacher, mask, projection) -> one value each.

    Args:
        label: the soft label.
        custom: custom losses by name.
    """

    def __init__(self, label: Any, custom: dict[str, nn.Cell]) -> None:
        super().__init__(auto_prefix=False)
        self.members = nn.CellList(
            [BuiltIn(t) if t.func_name in LOSSES else Custom(custom[t.func_name], t) for t in label.losses],
            auto_prefix=False,
        )
        self.factors = tuple(float(t.factor) for t in label.losses)
        self.pool = label.pool
        self.uses_mask = label.mask is not None
        self.by_labels = names_labels(label.mask)
        self.projects = False

    def project(self) -> None:
        """From now on compare hidden states through the projection."""
        self.projects = True
        for member in self.members:
            member.projects = member.may_project

    def construct(self, s, t, mask, projection):
        s = s.astype(ms.float32)
        t = t.astype(ms.float32)
        if self.uses_mask:
            mask = (mask != IGNORED).astype(ms.float32) if self.by_labels else mask.astype(ms.float32)
        else:
            mask = None
        if self.pool is not None:
            s = pool(s, self.pool, mask)
            t = pool(t, self.pool, mask)
            mask = None
        values: tuple = ()
        for member in self.members:
            values = values + (member(s, t, mask, projection),)
        return values

    def weighted(self, s, t, mask, projection):
        """The sum of the terms with their factors."""
        values = self.construct(s, t, mask, projection)
        total = values[0] * self.factors[0]
        for i in range(1, len(self.factors)):
            total = total + values[i] * self.factors[i]
        return total
