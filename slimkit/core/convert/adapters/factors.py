"""The two factors of a LoRA where several matrices are one, and where processes hold a part of each.

All of it moves stored values about, whatever their type, and computes with none: every way back is bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slimkit.core.errors import FileFormatError, PlanError

Array = np.ndarray[Any, Any]
Factors = tuple[Array, Array]  # a (rank, in), b (out, rank)


class Held(NamedTuple):
    """Where a matrix's own factors lie in those of the whole: how many ranks, from which on."""

    rank: int
    at: int


def joined(parts: Mapping[str, Factors], rows: Mapping[str, int]) -> tuple[Array, dict[str, Array], dict[str, Held]]:
    """One `a` for several matrices, and each one's rows of `b` beside it.

    Where all have the same `a`, it is the one; otherwise they stand one after the other, and each matrix's `b` is zero
    beside its own. A matrix without a delta gets rows of zeros.

    Args:
        parts: role -> its factors.
        rows: role -> its outputs, of all roles.

    Returns:
        a (ranks, in); role -> b (outputs, ranks); role -> where its own lie.

    Raises:
        PlanError: the parts have different inputs or element types.

    Example:
        >>> one = (np.ones((1, 2)), np.ones((2, 1)))
        >>> a, b, held = joined({"query": one, "value": (2 * one[0], one[1])}, {"query": 2, "key": 2, "value": 2})
        >>> b["value"].tolist(), held["value"]
        ([[0.0, 1.0], [0.0, 1.0]], Held(rank=1, at=1))
    """
    lows = [a for a, _ in parts.values()]
    if len({(a.shape[1], a.dtype, b.dtype) for a, b in parts.values()}) > 1:
        raise PlanError(f"{', '.join(parts)} differ in their inputs or element types and cannot be one matrix.")
    shared = all(np.array_equal(a, lows[0]) for a in lows)
    held, at = {}, 0
    for role, (a, _) in parts.items():
        held[role] = Held(len(a), 0 if shared else at)
        at += len(a)
    low = lows[0] if shared else np.concatenate(lows, 0)
    kind = next(iter(parts.values()))[1].dtype
    high = {role: np.zeros((count, len(low)), kind) for role, count in rows.items()}
    for role, (_, b) in parts.items():
        rank, start = held[role]
        high[role][:, start : start + rank] = b
    return low, high, held


def parted(low: Array, high: Array, held: Held | None) -> tuple[Factors, bool]:
    """One matrix's own factors out of the whole's, and whether they are the ones that went in by their place.

    What training has filled since, outside the place that `held` names, is kept: then the factors are the whole's.

    Example:
        >>> (a, b), own = parted(np.eye(3), np.eye(3)[:, :3] * [1, 0, 0], Held(1, 0))
        >>> a.shape, b.shape, own
        ((1, 3), (3, 1), True)
    """
    if held is not None:
        inside = slice(held.at, held.at + held.rank)
        outside = np.delete(high, np.r_[inside], 1)
        if not np.any(outside):
            return (low[inside], high[:, inside]), True
    return (low, high), False


def padded(factors: Factors, rank: int) -> Factors:
    """The same product with more ranks, all zero."""
    a, b = factors
    more = rank - len(a)
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def by_groups(high: Mapping[str, Array], groups: int) -> Array:
    """Rows of query, key and value as Megatron has them: of each group its queries, its key, its value.

    Example:
        >>> q, k, v = (np.arange(n)[:, None] for n in (4, 2, 2))
        >>> by_groups({"query": q, "key": 10 + k, "value": 20 + v}, 2)[:, 0].tolist()
        [0, 1, 10, 20, 2, 3, 11, 21]
    """
    cut = [np.split(high[role], groups) for role in ("query", "key", "value")]
    return np.concatenate([part for group in zip(*cut, strict=True) for part in group], 0)


def out_of_groups(rows: Array, groups: int, queries: int) -> dict[str, Array]:
    """The way back: role -> rows; `queries` is the number of query heads of a group.

    Example:
        >>> {r: x[:, 0].tolist() for r, x in out_of_groups(np.arange(8)[:, None], 2, 2).items()}
        {'query': [0, 1, 4, 5], 'key': [2, 6], 'value': [3, 7]}
    """
    width = len(rows) // (groups * (queries + 2))
    group = rows.reshape(groups, (queries + 2) * width, *rows.shape[1:])
    bounds = {"query": (0, queries), "key": (queries, queries + 1), "value": (queries + 1, queries + 2)}
    return {r: group[:, i * width : j * width].reshape(-1, *rows.shape[1:]) for r, (i, j) in bounds.items()}


def shards(high: Mapping[str, Array], roles: Sequence[str], groups: int, count: int) -> list[Array]:
    """What each of `count` processes holds of b's rows."""
    if tuple(roles) == ("query", "key", "value"):
        return np.split(by_groups(high, groups), count)
    cut = [np.split(high[role], count) for role in roles]
    return [np.concatenate(parts, 0) for parts in zip(*cut, strict=True)]


def gathered(parts: Sequence[Array], roles: Sequence[str], groups: int, queries: int) -> dict[str, Array]:
    """The way back from `shards`: role -> b's rows."""
    if tuple(roles) == ("query", "key", "value"):
        return out_of_groups(np.concatenate(parts, 0), groups, queries)
    cut = [np.split(part, len(roles)) for part in parts]
    return {role: np.concatenate([one[i] for one in cut], 0) for i, role in enumerate(roles)}


def same(parts: Sequence[Array], name: str) -> Array:
    """What every process holds alike; FileFormatError where they do not."""
    if any(part.shape != parts[0].shape or not np.array_equal(part, parts[0]) for part in parts[1:]):
        raise FileFormatError(f"{name} must be the same in every shard, and is not.")
    return parts[0]
