"""Over how many labels the loss of a batch is a mean, so that batches can be averaged as if they were one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from slimkit.core import check
from slimkit.core.distill.masks import IGNORED, names_labels
from slimkit.core.errors import ArgumentTypeError
from slimkit.core.train.framework import TrainFramework


def labels_of(batch: Any) -> Any:
    """The labels of a batch: under a name for labels in a mapping, or the second of (inputs, labels); else None."""
    if isinstance(batch, Mapping):
        return next((value for name, value in batch.items() if names_labels(name)), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def counted(batch: Any, to_array: Callable[[Any], Any]) -> float | None:
    """How many labels of a batch count: whole numbers that are not -100.

    Args:
        batch: one batch.
        to_array: makes a NumPy array of a tensor, None of anything else.

    Returns:
        Their number; None where the batch holds no whole numbers as labels.

    Example:
        >>> counted({"x": 0, "labels": np.array([[3, -100], [5, 7]])}, lambda value: value)
        3.0
    """
    labels = labels_of(batch)
    array = None if labels is None else to_array(labels)
    if array is None or np.asarray(array).dtype.kind not in "iu":
        return None
    return float((np.asarray(array) != IGNORED).sum())


def one_number(value: Any, name: str) -> float:
    """What a loss or metric gives, as a float: a number, or a tensor or array of one element.

    Args:
        value: what it gave.
        name: how the message calls it.

    Raises:
        ArgumentTypeError: it is no number, or several.

    Example:
        >>> one_number(np.array([[0.5]]), "metrics['accuracy']")
        0.5
    """
    try:
        return float(value.reshape(()) if hasattr(value, "reshape") else operator.pos(value))
    except (TypeError, ValueError, RuntimeError):
        refuse_several(value, name)


def refuse_several(value: Any, name: str) -> NoReturn:
    """Refuse what is no number, or several; `name` is what gave it."""
    shape = getattr(value, "shape", None)
    allowed = "one number, or a tensor of one element"
    if shape is None:
        check.wrong_type(name, allowed, value)
    raise ArgumentTypeError(f"{name} must be {allowed}. Received: a {type(value).__name__} of shape {tuple(shape)}")


class Counting(TrainFramework):
    """What a trainer knows of the tokens or labels in its batches."""

    count_tokens: Callable[[Any], float] | None = None
    # Those of the updates so far, where `count_tokens` counts them.
    tokens_seen: float = 0.0

    def _counts(self, batch: Any) -> float | None:
        """Over how many tokens or labels a batch's loss is a mean; None where nothing says so."""
        return self.count_tokens(batch) if self.count_tokens is not None else counted(batch, self._array)

    def _shares(self, batches: Sequence[Any], total: Callable[[float], float]) -> list[float]:
        """What the loss of each batch is divided by, so that together they are the mean over all that counts.

        Args:
            batches: those of one update.
            total: gives, of this process's count, the mean over all processes.
        """
        found = [self._counts(batch) for batch in batches]
        if any(n is None for n in found):
            return [float(len(batches))] * len(batches)
        whole = total(math.fsum(n for n in found if n is not None))
        # A batch in which nothing counts has no mean; it may come with any number that is none.
        return [whole / n if n else math.inf for n in found]

    def _saw(self, batches: Sequence[Any]) -> None:
        if self.count_tokens is not None:
            self.tokens_seen += math.fsum(map(self.count_tokens, batches))
