"""A teacher's distribution in a few numbers a row: the likeliest classes as they are, the others drawn without bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.distill.config import DistillSpec
from slimkit.core.distill.losses import log_softmax
from slimkit.core.errors import ConfigError

Array = np.ndarray[Any, Any]

# What stands for a probability of zero among logits; its product with one is zero in float32, where -inf gives NaN.
NEVER = -1e4
# Losses that read a teacher's distribution and not its logits.
READ_BY = ("KDCrossEntropy", "KDKLDiv")


def temperatures(spec: DistillSpec, logits: list[bool]) -> list[float]:
    """The temperature of each label, at which its distribution is drawn from.

    Args:
        spec: what is compared.
        logits: for each label, whether it compares logits alone; others are kept whole.

    Raises:
        ConfigError: a label with several temperatures, or with a loss that reads logits and not a distribution.
    """
    found = []
    for label, drawn in zip(spec.soft_labels, logits):
        odd = sorted({term.func_name for term in label.losses} - set(READ_BY)) if drawn else []
        if odd:
            raise ConfigError(f"sampled: {label.label} has {', '.join(odd)}; draws are for {' and '.join(READ_BY)}")
        heats = {term.temperature for term in label.losses} if drawn else {1.0}
        if len(heats) > 1:
            raise ConfigError(f"sampled: {label.label} has the temperatures {sorted(heats)}; draws are for one")
        found.append(heats.pop())
    return found


def draw(logits: Array, count: int, temperature: float, rng: np.random.Generator) -> dict[str, Array]:
    """Classes and weights whose weighted sum of any function is that under the teacher's distribution, on average.

    After Anshumann et al. 2025 (Sparse Logit Sampling, sec. 4), which draws all classes: the `count // 2` likeliest are
    kept with their own probability, the others drawn by systematic sampling in proportion to theirs, each draw with an
    equal share of what is left. A cut to the likeliest alone is biased, as is an even spread of the rest.

    Args:
        logits: (rows, classes).
        count: classes kept of each row.
        temperature: of the distribution.
        rng: one draw a row.

    Returns:
        "ids" (rows, count), and "weights" (rows, count) that sum to one in each row.

    Example:
        >>> found = draw(np.log([[0.5, 0.25, 0.125, 0.125]]), 2, 1.0, np.random.default_rng(0))
        >>> found["weights"].tolist(), int(found["ids"][0, 0])
        ([[0.5, 0.5]], 0)
    """
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))  # (rows, classes)
    rows, n_classes = p.shape
    n_top = count // 2
    top = np.argpartition(p, n_classes - n_top, -1)[:, n_classes - n_top :]  # (rows, n_top)
    kept = np.take_along_axis(p, top, -1)
    np.put_along_axis(p, top, 0.0, -1)
    reached = np.cumsum(p, -1)
    rest, drawn = reached[:, -1:], count - n_top
    # One uniform number a row; points at equal distances hit each class in proportion to its probability.
    points = (rng.random((rows, 1)) + np.arange(drawn)) / drawn * rest
    ids = np.stack([np.searchsorted(r, x, side="right") for r, x in zip(reached, points)])
    weights = np.concatenate([kept, np.repeat(rest / drawn, drawn, -1)], -1)
    kind = np.uint16 if n_classes <= 1 << 16 else np.int32
    return {
        "ids": np.concatenate([top, np.minimum(ids, n_classes - 1)], -1).astype(kind),
        "weights": weights.astype(np.float32),
    }


def undrawn(kept: Mapping[str, Array], n_classes: int, temperature: float) -> Array:
    """What `draw` kept, as logits (..., n_classes) whose distribution at that temperature has these weights."""
    ids, weights = kept["ids"].astype(np.int64), kept["weights"].astype(np.float64)
    full = np.zeros((*ids.shape[:-1], n_classes), np.float64)
    rows = np.indices(ids.shape)[:-1]
    np.add.at(full, (*rows, ids), weights)  # a class may be drawn more than once
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(full > 0, temperature * np.log(full), temperature * NEVER), np.float32)
