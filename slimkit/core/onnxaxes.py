"""Open axes of an exported file: what the user asks for, other sizes to prove it with, and names for the outputs'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError, ConfigError

Array = np.ndarray[Any, Any]
Axes = dict[str, dict[int, str]]


def open_axes(dynamic: Any, dynamic_batch: bool, shapes: Mapping[str, tuple[int, ...]]) -> Axes:
    """The open axes of each input.

    Args:
        dynamic: input -> {axis: name}, or one {axis: name} for every input that has the axis; None for none.
        dynamic_batch: the first axis of every input is open, as "batch".
        shapes: input -> shape of the example.

    Returns:
        Input -> {axis: name}, axes counted from 0, inputs without an open axis left out.

    Raises:
        ArgumentTypeError, ArgumentError: an unknown input, an axis that it lacks, or one name for unequal sizes.

    Example:
        >>> open_axes({1: "sequence"}, True, {"ids": (2, 8), "scale": (2,)})
        {'ids': {0: 'batch', 1: 'sequence'}, 'scale': {0: 'batch'}}
    """
    check.boolean(dynamic_batch, "dynamic_batch")
    found: Axes = {name: {0: "batch"} if dynamic_batch and shape else {} for name, shape in shapes.items()}
    given = {} if dynamic is None else dynamic
    if not isinstance(given, Mapping):
        check.wrong_type("dynamic", "a mapping of inputs to {axis: name}", dynamic)
    if given and all(isinstance(key, int) for key in given):
        if unfit := [axis for axis in given if not any(_has(shape, axis) for shape in shapes.values())]:
            raise ArgumentError(f"dynamic: no input has an axis {unfit[0]}. Shapes: {dict(shapes)}")
        given = {name: {a: v for a, v in given.items() if _has(shape, a)} for name, shape in shapes.items()}
    for name, axes in given.items():
        if name not in shapes:
            raise ArgumentError(f"dynamic: no input {name!r}{check.near(str(name), list(shapes))}. It has {[*shapes]}")
        if not isinstance(axes, Mapping):
            check.wrong_type(f"dynamic[{name!r}]", "a mapping {axis: name}", axes)
        for axis, label in axes.items():
            if not _has(shapes[name], axis):
                raise ArgumentError(f"dynamic[{name!r}]: an axis {axis!r} where the shape is {shapes[name]}")
            found[name][axis % len(shapes[name])] = check.text(label, f"dynamic[{name!r}][{axis}]")
    found = {name: dict(sorted(axes.items())) for name, axes in found.items() if axes}
    _sizes(found, shapes)
    return found


def _has(shape: tuple[int, ...], axis: Any) -> bool:
    return isinstance(axis, int) and not isinstance(axis, bool) and -len(shape) <= axis < len(shape)


def _sizes(axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The example's size of each name."""
    sizes: dict[str, int] = {}
    for name, mine in axes.items():
        for axis, label in mine.items():
            size = shapes[name][axis]
            if sizes.setdefault(label, size) != size:
                raise ArgumentError(f"dynamic: {label!r} names axes of {sizes[label]} and of {size}")
    return sizes


def other_sizes(axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Name -> (size in the example, another size to try): about half, for models have a longest text; never 1.

    Example:
        >>> other_sizes({"x": {0: "batch", 1: "sequence"}}, {"x": (1, 9)})
        {'batch': (1, 2), 'sequence': (9, 4)}
    """
    return {label: (n, n + 1 if n < 3 else max(2, n // 2)) for label, n in _sizes(axes, shapes).items()}


def resized(array: Array, axes: Mapping[int, str], sizes: Mapping[str, tuple[int, int]]) -> Array:
    """An array cut, or repeated, to the other sizes.

    Example:
        >>> resized(np.array([[1, 2]]), {1: "n"}, {"n": (2, 3)}).tolist()
        [[1, 2, 1]]
    """
    for axis, label in axes.items():
        before, after = sizes[label]
        array = np.take(array, np.arange(after) % before, axis)
    return array


def output_axes(
    first: Mapping[str, tuple[int, ...]],
    second: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, tuple[int, int]],
) -> Axes:
    """The open axes of the outputs: those whose sizes differ between the two runs.

    Args:
        first: output -> shape for the example.
        second: the same at the other sizes.
        sizes: name -> the two sizes.

    Returns:
        Output -> {axis: name}; an axis that follows no named one gets a name of its own.

    Example:
        >>> output_axes({"y": (2, 5)}, {"y": (3, 5)}, {"batch": (2, 3)})
        {'y': {0: 'batch'}}
    """
    found: Axes = {}
    for name, shape in first.items():
        for axis, pair in enumerate(zip(shape, second[name])):
            if pair[0] != pair[1]:
                labels = [label for label, size in sizes.items() if size == pair]
                found.setdefault(name, {})[axis] = labels[0] if len(labels) == 1 else f"{name}_{axis}"
    return found


def parse_axes(texts: list[str]) -> dict[Any, Any] | None:
    """What a command line says: "0:batch,1:sequence" for every input, or "INPUT=0:batch,1:sequence" for one.

    Example:
        >>> parse_axes(["ids=0:batch,1:sequence"]), parse_axes(["0:batch"])
        ({'ids': {0: 'batch', 1: 'sequence'}}, {0: 'batch'})
    """
    named: dict[str, dict[int, str]] = {}
    every: dict[int, str] = {}
    for text in texts:
        name, sign, pairs = text.rpartition("=")
        for pair in pairs.split(","):
            axis, _, label = pair.partition(":")
            if not label or not axis.lstrip("-").isdecimal() or (sign and not name):
                raise ConfigError(f"--dynamic must be INPUT=AXIS:NAME,AXIS:NAME or AXIS:NAME. Received: {text!r}")
            (named.setdefault(name, {}) if sign else every)[int(axis)] = label
    if named and every:
        raise ConfigError("--dynamic: name the input in all of them, or in none")
    return named or every or None
