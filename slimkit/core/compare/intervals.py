"""Paired bootstrap over documents: whether a difference between two models is more than the choice of texts.

The documents are drawn with replacement, both models are judged on the same draw, and the difference is looked at over
all draws (Efron & Tibshirani, An Introduction to the Bootstrap, sections 8 and 13.3: percentile intervals). A metric is
a function of sums over documents, so that one matrix product (draws, documents) @ (documents, sums) gives every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from slimkit.core.compare.figures import FIGURES

Array = np.ndarray[Any, Any]
DRAWS = 2000
# What an interval is of, by the word in FIGURES.
_DIFFERENCES: dict[str, Callable[[Array, Array], Array]] = {
    "ratio": lambda small, dense: small / dense,
    "gap": lambda small, dense: small - dense,
    "own": lambda small, dense: small,
}


def draws(n_documents: int, seed: int, n: int = DRAWS) -> Array:
    """How often each document is drawn, (draws, documents) float64.

    Args:
        n_documents: number of documents.
        seed: of the draws; the same for every metric and model, so that all are paired.
        n: number of draws.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1.0 / n_documents), size=n).astype(np.float64)


def interval(
    counts: Array,
    dense: Array,
    small: Array,
    metric: Callable[[Array], Array],
    difference: Callable[[Array, Array], Array] = lambda small, dense: small - dense,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """The percentile interval of a difference; None with fewer than two documents, of which nothing can be said.

    Args:
        counts: as `draws` gives them, (draws, documents).
        dense, small: sums of each document, (documents, sums).
        metric: sums (..., sums) -> metric (...).
        difference: (small, dense) -> what is reported.
        level: share of the draws inside.

    Example:
        >>> sums = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
        >>> mean = lambda s: s[..., 0] / s[..., 1]
        >>> low, high = interval(draws(3, 0), sums, sums + [1.0, 0.0], mean)
        >>> round(low, 9), round(high, 9)
        (1.0, 1.0)
    """
    if dense.shape[0] < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        values = difference(metric(counts @ small), metric(counts @ dense))
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def figures_of(
    rules: Mapping[str, Callable[[Array], Array]], small: Array, dense: Array, counts: Array, compared: bool
) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
    """Metrics of all documents together, and the intervals of what FIGURES says is to be compared."""
    found: dict[str, float | None] = {n: float(rule(small.sum(0))) for n, rule in rules.items()}
    intervals = {}
    for name, rule in rules.items() if compared else ():
        ends = interval(counts, dense, small, rule, _DIFFERENCES[FIGURES[name].difference])
        if ends is not None:
            intervals[name] = ends
    return found, intervals
