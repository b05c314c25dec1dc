"""R-Drop: every sample twice through dropout, and a loss that asks both passes to agree."""

from __future__ import annotations

from typing import Any

from slimkit.core.delta.layers import IGNORED, IMPOSSIBLE, check_class_numbers, check_pairs, check_rdrop_alpha
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn, ops

__all__ = ["RDropLoss", "bridge", "rdrop_repeat"]


def rdrop_repeat(*items: Any) -> tuple[Any, ...]:
    """Each tensor with every row twice in a row, for RDropLoss.

    Args:
        items: tensors, batch first.

    Returns:
        As many tensors, each with twice the rows.

    Example:
        >>> rdrop_repeat(ms.Tensor([1, 2]))[0].asnumpy().tolist()
        [1, 1, 2, 2]
    """
    return tuple(ops.repeat_interleave(item, 2, 0) for item in items)


class RDropLoss(nn.Cell):
    """Cross entropy plus the divergence between the two passes of each sample.

    loss = mean cross entropy + alpha / 4 * mean over samples of KL(p1 | p2) + KL(p2 | p1)

    Rows with the label -100 count in neither mean; a batch of nothing else costs 0.

    Source:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", eq. 4, with the mean of the two cross
        entropies, so that alpha is the paper's.

    Example:
        >>> round(float(RDropLoss()(ms.ops.zeros((2, 3)), ms.Tensor([0, 0]))), 4)
        1.0986
    """

    def __init__(self) -> None:
        super().__init__()

    def construct(self, logits: Any, label_ids: Any, alpha: float = 4) -> Any:
        """The loss of logits whose rows come in pairs.

        Args:
            logits: (2 * batch, classes), any shift of log-probabilities, rows as rdrop_repeat makes them.
            label_ids: (2 * batch,) class numbers, -100 for a row that does not count, or (2 * batch, classes)
                probabilities.
            alpha: weight of the divergence.

        Returns:
            A scalar.

        Raises:
            ArgumentTypeError: alpha is no int or float, or class numbers are no integers.
            ArgumentError: an odd number of rows, or labels of another length.
        """
        weight = check_rdrop_alpha(alpha)
        hard = label_ids.ndim != logits.ndim or label_ids.shape[-1] != logits.shape[-1]
        labels = label_ids.reshape((-1,)) if hard else label_ids
        check_pairs(logits.shape[0], labels.shape[0])
        logits, classes = logits.astype(ms.float32), logits.shape[-1]
        if hard:
            # What does not count may be no number at all, and times zero that is none either.
            logits = ops.where(ops.expand_dims(labels == IGNORED, -1), 0.0, logits)
        log_p = ops.maximum(ops.log_softmax(logits, -1), IMPOSSIBLE)  # (2 b, classes)
        if hard:
            check_class_numbers(labels.is_floating_point(), labels.dtype)
            labels = labels.astype(ms.int32)
            counts = ops.cast(labels != IGNORED, ms.float32)  # (2 b,)
            wanted = ops.one_hot(ops.where(labels == IGNORED, 0, labels), classes).astype(ms.float32)
            # A compiled graph cannot raise: a label that is no class makes the loss nan.
            wrong = ops.logical_and(labels != IGNORED, ops.logical_or(labels < 0, labels >= classes))
            wanted = ops.where(ops.expand_dims(wrong, -1), float("nan"), wanted) * ops.expand_dims(counts, -1)
        else:
            counts = ops.ones_like(log_p[:, 0])
            wanted = labels.astype(ms.float32)
        cross = -(wanted * log_p).sum() / ops.maximum(counts.sum(), 1.0)
        pairs = counts[0::2] * counts[1::2]  # (b,)
        first, second = log_p[0::2], log_p[1::2]
        apart = ((ops.exp(first) - ops.exp(second)) * (first - second)).sum(-1)  # (b,)  KL(p1|p2) + KL(p2|p1)
        apart = (apart * pairs).sum() / ops.maximum(pairs.sum(), 1.0)
        return cross + weight / 4 * apart
