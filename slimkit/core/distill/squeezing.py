"""Logits that are kept in part: the largest of each row, and what all others come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def squeeze_logits(logits: Array, k: int, dtype: str) -> dict[str, Array]:
    """The k largest logits of each row, and one value for all others that keeps their total probability.

    Args:
        logits: (..., classes).
        k: how many to keep; all classes or more keeps the array as it is.
        dtype: "float32" or "float16", of the kept values.

    Returns:
        "dense", or "values", "places" (..., k) and "tail" (...).

    Example:
        >>> squeeze_logits(np.array([[1.0, 0.0]]), 2, "float32")["dense"].tolist()
        [[1.0, 0.0]]
    """
    n = logits.shape[-1]
    if k >= n:
        return {"dense": logits.astype(dtype)}
    places = np.argpartition(logits, n - k, axis=-1)[..., n - k :]
    values = np.take_along_axis(logits, places, -1)
    top = logits.max(-1, keepdims=True).astype(np.float64)
    rest = np.exp(logits - top).sum(-1) - np.exp(values - top).sum(-1)
    tail = np.log(np.maximum(rest, 1e-30) / (n - k)) + top[..., 0]
    # A share of the rest can never exceed the smallest value that was kept.
    tail = np.minimum(tail, values.min(-1))
    return {"values": values.astype(dtype), "places": places.astype(np.int32), "tail": tail.astype(np.float32)}


def spread_logits(kept: Mapping[str, Array], n_classes: int) -> Array:
    """What `squeeze_logits` kept, as logits over all classes, float32."""
    if "dense" in kept:
        return kept["dense"].astype(np.float32)
    full = np.repeat(kept["tail"][..., None], n_classes, -1).astype(np.float32)
    np.put_along_axis(full, kept["places"].astype(np.int64), kept["values"].astype(np.float32), -1)
    return full
