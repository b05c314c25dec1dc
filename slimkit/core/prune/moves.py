"""Operators that only move elements, and where they put what is said of each, in arrays that broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimkit.core.prune.graph import Node

Array = np.ndarray[Any, Any]
Shapes = Callable[[int | None], tuple[int, ...]]
Given = Sequence[Any]

# What is said of an element of which nothing is.
NONE = -1


def _reshape(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    """Axes that a reshape joins or parts are spelled out where one of them tells channels apart."""
    before, after, labels = shapes(node.inputs[0]), shapes(node.outputs[0]), given[0]
    spelt: list[int] = []
    made: list[int] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start, stop = i, j
        left, right = 1, 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            elif j < len(after):
                right, j = right * after[j], j + 1
            else:
                left, i = left * before[i], i + 1
            if left == right and (i > start or j > stop):
                break
        apart = any(labels.shape[k] > 1 for k in range(start, i))
        spelt += before[start:i] if apart else [1] * (i - start)
        made += after[stop:j] if apart else [1] * (j - stop)
    return [np.broadcast_to(labels, spelt).reshape(made)]


def _repeat(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    return [np.tile(given[0], [n if s > 1 else 1 for n, s in zip(node.attrs["repeats"], given[0].shape)])]


def _slice(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    axis, labels = node.attrs["axis"], given[0]
    if labels.shape[axis] == 1:
        return [labels]
    place = slice(node.attrs["start"], node.attrs["stop"], node.attrs["step"])
    return [labels[(slice(None),) * axis + (place,)]]


def _split(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    axis, labels = node.attrs["axis"], given[0]
    if labels.shape[axis] == 1:
        return [labels] * len(node.outputs)
    return np.split(labels, np.cumsum(node.attrs["sizes"])[:-1], axis=axis)


def _select(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    axis, labels = node.attrs["axis"], given[0]
    many = [node.attrs["index"]] if node.op == "select" else range(len(node.outputs))
    return [labels.take(k if labels.shape[axis] > 1 else 0, axis) for k in many]


def _concat(node: Node, shapes: Shapes, given: Given) -> list[Array]:
    """Parts whose channels differ in other axes are spelled out there."""
    rank, stacked = len(shapes(node.outputs[0])), node.op == "stack"
    axis, parts = node.attrs["axis"], []
    for number, labels in zip(node.inputs, given):
        size = 1 if stacked else shapes(number)[axis]
        own = np.full((1,) * rank, NONE) if labels is None else np.expand_dims(labels, axis) if stacked else labels
        parts.append(np.broadcast_to(own, (*own.shape[:axis], size, *own.shape[axis + 1 :])))
    wide = [max(sizes) for sizes in zip(*(p.shape for p in parts))]
    return [np.concatenate([np.broadcast_to(p, (*wide[:axis], p.shape[axis], *wide[axis + 1 :])) for p in parts], axis)]


# operator -> (node, shape of a value, what is said of its inputs) -> what is said of its outputs
MOVES: dict[str, Callable[[Node, Shapes, Given], list[Array]]] = {
    "identity": lambda node, shapes, given: [given[0]] * len(node.outputs),
    "expand": lambda node, shapes, given: [given[0]] * len(node.outputs),
    "transpose": lambda node, shapes, given: [given[0].transpose(node.attrs["perm"])],
    "reshape": _reshape,
    "repeat": _repeat,
    "slice": _slice,
    "split": _split,
    "select": _select,
    "unbind": _select,
    "concat": _concat,
    "stack": _concat,
}
