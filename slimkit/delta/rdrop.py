"""R-Drop: every sample twice through dropout, and a loss that asks both passes to agree."""

from __future__ import annotations

from slimkit import bridge
from slimkit.core.delta.layers import IGNORED, IMPOSSIBLE, check_class_numbers, check_pairs, check_rdrop_alpha

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["RDropLoss", "bridge", "rdrop_repeat"]


def rdrop_repeat(*items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor with every row twice in a row, for RDropLoss.

    Args:
        items: tensors, batch first.

    Returns:
        As many tensors, each with twice the rows.

    Example:
        >>> rdrop_repeat(torch.tensor([1, 2]))
        (tensor([1, 1, 2, 2]),)
    """
    return tuple(item.repeat_interleave(2, 0) for item in items)


class RDropLoss(nn.Module):
    """Cross entropy plus the divergence between the two passes of each sample.

    loss = mean cross entropy + alpha / 4 * mean over samples of KL(p1 | p2) + KL(p2 | p1)

    Rows with the label -100 count in neither mean; a batch of nothing else costs 0.

    Source:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", eq. 4, with the mean of the two cross
        entropies, so that alpha is the paper's.

    Example:
        >>> RDropLoss()(torch.zeros(2, 3), torch.tensor([0, 0])).item()
        1.0986123085021973
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, logits: torch.Tensor, label_ids: torch.Tensor, alpha: float = 4) -> torch.Tensor:
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
        labels = label_ids.reshape(-1) if hard else label_ids
        check_pairs(logits.shape[0], labels.shape[0])
        counts = labels != IGNORED if hard else torch.ones_like(logits[:, 0], dtype=torch.bool)
        # What does not count may be no number at all, and times zero that is none either.
        logits = logits.float().masked_fill(~counts.unsqueeze(-1), 0)
        log_p = F.log_softmax(logits, -1).clamp_min(IMPOSSIBLE)  # (2 b, classes)
        if hard:
            check_class_numbers(labels.is_floating_point(), labels.dtype)
            cross = F.nll_loss(log_p, labels.long(), ignore_index=IGNORED, reduction="sum")
        else:
            cross = -(labels.float() * log_p).sum()
        pairs = counts[0::2] & counts[1::2]  # (b,)
        first, second = log_p[0::2], log_p[1::2]
        apart = ((first.exp() - second.exp()) * (first - second)).sum(-1)  # (b,)  KL(p1|p2) + KL(p2|p1)
        apart = apart.masked_fill(~pairs, 0).sum() / pairs.sum().clamp_min(1)
        return cross / counts.sum().clamp_min(1) + weight / 4 * apart
