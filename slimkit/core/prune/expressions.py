"""An axis in plain data: how long it is, and which of its indices stay when variables lose some of theirs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

# A number (stays whole), a variable's name, or ["*" or "+", part, part, ...].
Expr = int | str | list[Any]
Index = np.ndarray[Any, np.dtype[np.int64]]


def simplify(op: str, parts: list[Expr]) -> Expr:
    """A product ("*") or sum ("+") of parts, nested ones of the same kind opened and numbers put together."""
    flat: list[Expr] = []
    for part in parts:
        nested = isinstance(part, list) and part[0] == op
        for item in part[1:] if nested else [part]:  # type: ignore[index]
            if op == "+" and isinstance(item, int) and flat and isinstance(flat[-1], int):
                flat[-1] += item
            else:
                flat.append(item)
    if op == "*":
        flat = [p for p in flat if p != 1] or [1]
    return flat[0] if len(flat) == 1 else [op, *flat]


def size_of(expr: Expr, counts: Mapping[str, int]) -> int:
    """Indices of an axis when each variable has so many.

    Example:
        >>> size_of(["*", "d0", 4], {"d0": 3})
        12
    """
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        return counts[expr]
    sizes = [size_of(part, counts) for part in expr[1:]]
    return math.prod(sizes) if expr[0] == "*" else sum(sizes)


def mentions(expr: Expr, names: Collection[str]) -> bool:
    """Whether one of some variables is in an expression.

    Example:
        >>> mentions(["+", 8, ["*", "d0", 4]], {"d0"})
        True
    """
    if isinstance(expr, list):
        return any(mentions(e, names) for e in expr[1:])
    return expr in names


def kept(expr: Expr, full: Mapping[str, int], keep: Mapping[str, Index]) -> Index:
    """The indices of an axis that stay.

    Args:
        expr: the axis.
        full: size of each variable before pruning.
        keep: the indices of each variable that stay, ascending; one that is missing keeps all.

    Returns:
        Ascending indices.

    Example:
        >>> kept(["*", "d0", 2], {"d0": 3}, {"d0": np.array([0, 2])}).tolist()
        [0, 1, 4, 5]
    """
    if isinstance(expr, int):
        return np.arange(expr)
    if isinstance(expr, str):
        return keep[expr] if expr in keep else np.arange(full[expr])
    parts = [(kept(p, full, keep), size_of(p, full)) for p in expr[1:]]
    if expr[0] == "+":
        offsets = np.cumsum([0] + [n for _, n in parts[:-1]])
        return np.concatenate([index + offset for (index, _), offset in zip(parts, offsets)])
    index = parts[0][0]
    for inner, size in parts[1:]:
        index = (index[:, None] * size + inner[None, :]).reshape(-1)
    return index


def owners(expr: Expr, full: Mapping[str, int], name: str) -> Index | None:
    """For each index of an axis, the index of a variable that it belongs to, or -1; None where it is not mentioned.

    Example:
        >>> owners(["+", 1, ["*", "d0", 2]], {"d0": 2}, "d0").tolist()
        [-1, 0, 0, 1, 1]
    """
    if isinstance(expr, int):
        return None
    if isinstance(expr, str):
        return np.arange(full[expr]) if expr == name else None
    parts = [(owners(p, full, name), size_of(p, full)) for p in expr[1:]]
    if all(index is None for index, _ in parts):
        return None
    if expr[0] == "+":
        return np.concatenate([np.full(n, -1) if index is None else index for index, n in parts])
    result: Index | None = None
    before = 1
    for index, size in parts:
        if result is not None:
            result = np.repeat(result, size)
        elif index is not None:
            result = np.tile(index, before)
        before *= size
    return result


def linear_form(expr: Expr, order: Mapping[str, int]) -> tuple[int, dict[int, int]]:
    """An axis's size as constant + coefficient times count for each variable (a product holds one variable factor)."""
    if isinstance(expr, int):
        return expr, {}
    if isinstance(expr, str):
        return 0, {order[expr]: 1}
    constant, slopes = linear_form(expr[1], order)
    for part in expr[2:]:
        other, more = linear_form(part, order)
        if expr[0] == "+":
            constant += other
            for key, value in more.items():
                slopes[key] = slopes.get(key, 0) + value
        elif slopes and more:
            raise ArithmeticError(f"two variable factors in {expr}")
        else:
            slopes = {k: v * other for k, v in slopes.items()} | {k: v * constant for k, v in more.items()}
            constant *= other
    return constant, slopes
