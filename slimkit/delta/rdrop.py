"""R-Drop: every sample twice through dropout, and a loss that asks both passes to agree."""

from __future__ import annotations

from slimkit import bridge
from slimkit.core.delta.layers import check_pairs, check_rdrop_alpha

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
            label_ids: (2 * batch,) class numbers, or (2 * batch, classes) probabilities.
            alpha: weight of the divergence.

        Returns:
            A scalar.

        Raises:
            ArgumentTypeError: alpha is no int or float.
            ArgumentError: an odd number of rows, or labels of another length.
        """
        weight = check_rdrop_alpha(alpha)
        labels = label_ids if label_ids.is_floating_point() else label_ids.reshape(-1)
        pairs = check_pairs(logits.shape[0], labels.shape[0])
        log_p = F.log_softmax(logits.float(), -1)
        if labels.is_floating_point():
            cross = -(labels.float() * log_p).sum(-1).mean()
        else:
            cross = F.nll_loss(log_p, labels.long())
        first, second = log_p[0::2], log_p[1::2]
        apart = ((first.exp() - second.exp()) * (first - second)).sum() / pairs  # KL(p1|p2) + KL(p2|p1)
        return cross + weight / 4 * apart
