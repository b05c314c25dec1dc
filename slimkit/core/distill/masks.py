"""What a mask means: which rows of a batch count. 0 and 1, or labels of which -100 is none."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.errors import ConfigError

Array = np.ndarray[Any, Any]

IGNORED = -100  # the label of a position without one, in PyTorch, MindSpore and Hugging Face alike
_LABELS = ("label", "labels", "label_ids", "target", "targets")


def names_labels(name: Any) -> bool:
    """Whether a forward argument of that name holds labels, of which 0 and 1 are classes and -100 is none.

    Example:
        >>> names_labels("labels"), names_labels("attention_mask"), names_labels(1)
        (True, False, False)
    """
    return name in _LABELS


def holds_labels(values: Array, name: Any, where: str) -> bool:
    """Whether a mask holds labels (-100 for "does not count") and not 1 and 0; anything else is refused.

    Args:
        values: the mask of one batch.
        name: what the forward calls it.
        where: how a message calls the soft label.

    Raises:
        ConfigError: values that are neither, an additive mask of 0 and -inf for example.

    Example:
        >>> holds_labels(np.array([3, 0, -100]), "y", "output"), holds_labels(np.array([1, 0]), "mask", "output")
        (True, False)
    """
    found = np.asarray(values)
    if found.dtype.kind != "b":
        if names_labels(name) or (found.dtype.kind in "iu" and (found == IGNORED).any()):
            return True
        if not ((found == 0) | (found == 1)).all():
            low, high = (f"{v:.4g}" for v in (np.nanmin(found), np.nanmax(found)))
            raise ConfigError(
                f"mask {name!r} of {where} must be 1 on real positions and 0 on padding, or an argument called labels, "
                f"of which {IGNORED} does not count. Received: values from {low} to {high}"
            )
    return False
