"""What the rules build with: values for names, nodes for operators, and the little bookkeeping between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.prune.graph import Graph
from slimkit_ms.trace.mindir import Constant, Record, Shape

Rule = Callable[["Builder", Record], Any]

# A name in the compiled graph stands for a value's number, a Constant, or a list of these (a tuple).
Entry = Any


@dataclass
class Later:
    """A part of a tuple that no rule speaks of; it becomes the output of an opaque node if somebody reads it."""

    record: Record
    shape: Shape


@dataclass
class Builder:
    """A neutral graph in the making.

    Args:
        graph: what is being built.
        uses: how often each name of the compiled graph is read.
        tables: shapes of tensors that cells hold as plain attributes; a constant of such a shape cannot be recomputed.
    """

    graph: Graph
    uses: Mapping[str, int]
    tables: set[Shape]
    env: dict[str, Entry] = field(default_factory=dict)
    producer: dict[int, int] = field(default_factory=dict)  # value -> place of its node

    def entry(self, name: Any) -> Entry:
        """What an input of a record stands for."""
        return name if isinstance(name, Constant) else self.env[name]

    def number(self, entry: Entry) -> int:
        """The value number of an entry; constants become values when first needed as tensors."""
        if isinstance(entry, int):
            return entry
        if isinstance(entry, Later):
            return self.opaque(entry.record, [entry.shape])[0]
        value = entry.value if isinstance(entry, Constant) else entry
        array = np.asarray(0 if value is None or isinstance(value, str) else value)
        same = array.size > 0 and bool((array == array.reshape(-1)[0]).all())
        return self.graph.add_value(array.shape, "uniform" if same and array.shape not in self.tables else "constant")

    def tensor(self, record: Record, place: int) -> int | None:
        """The value number of an input; None where it is absent or None."""
        if place >= len(record.inputs):
            return None
        entry = self.entry(record.inputs[place])
        if isinstance(entry, Constant) and entry.value is None:
            return None
        return self.number(entry)

    def need(self, record: Record, place: int) -> int:
        """The value number of an input that must be there."""
        number = self.tensor(record, place)
        if number is None:
            raise NotSaid(f"input {place} is missing")
        return number

    def arg(self, record: Record, place: int, name: str, default: Any = None) -> Any:
        """A plain argument: an input that is a constant, else the primitive's attribute, else the default."""
        if place < len(record.inputs):
            entry = self.entry(record.inputs[place])
            if isinstance(entry, Constant):
                value = entry.value
                return value.tolist() if isinstance(value, np.ndarray) else value
            if isinstance(entry, list) and all(isinstance(e, Constant) for e in entry):
                return tuple(e.value for e in entry)
            if place > 0:
                raise NotSaid(f"{name} is known only when the model runs")
        return record.attrs.get(name, default)

    def shape(self, number: int) -> Shape:
        """A value's shape."""
        return self.graph.values[number].shape

    def emit(
        self, op: str, inputs: Sequence[int | None], shapes: Sequence[Shape], scope: str, **attrs: Any
    ) -> list[int]:
        """Append a node with fresh outputs of the shapes given; returns their numbers."""
        outputs = [self.graph.add_value(shape) for shape in shapes]
        self.graph.add(op, inputs, outputs, scope, **attrs)
        for number in outputs:
            self.producer[number] = len(self.graph.nodes) - 1
        return outputs

    def one(self, op: str, inputs: Sequence[int | None], shape: Shape, scope: str, **attrs: Any) -> int:
        """Append a node with one output."""
        return self.emit(op, inputs, [shape], scope, **attrs)[0]

    def opaque(self, record: Record, shapes: Sequence[Shape]) -> list[int]:
        """Append a node that no rule explains; everything it touches stays whole."""
        touched = [n for name in record.inputs for n in self.flat(self.entry(name))]
        return self.emit("opaque", touched, shapes, record.scope, fn=record.op or "a branch or a loop")

    def flat(self, entry: Entry) -> list[int]:
        """The tensors in an entry, constants left out."""
        if isinstance(entry, (list, tuple)):
            return [n for part in entry for n in self.flat(part)]
        if isinstance(entry, Constant):
            return []
        return [self.number(entry)]


class NotSaid(Exception):
    """A form of an operator that the vocabulary has no word for; private, so that no real error hides in it."""


def flat_shapes(shapes: Any) -> list[Shape]:
    """The shapes of a tuple's tensors, nested ones opened.

    Example:
        >>> flat_shapes([(2, 3), [(1,)]])
        [(2, 3), (1,)]
    """
    if isinstance(shapes, tuple):
        return [shapes]
    return [s for part in shapes or () for s in flat_shapes(part)]


def shape_of(r: Record, place: int | None = None) -> Shape:
    shape = r.shapes if place is None else r.shapes[place]
    if not isinstance(shape, tuple):
        raise NotSaid("no shape")
    if any(s < 0 for s in shape):
        raise NotSaid("a size known only when the model runs")
    return shape


def axis_of(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def axes_of(axis: Any, rank: int) -> tuple[int, ...]:
    """Axes as a sorted tuple; None and () mean all."""
    if axis is None or axis == () or axis == []:
        return tuple(range(rank))
    axis = axis if isinstance(axis, (tuple, list)) else (axis,)
    return tuple(sorted(axis_of(int(a), rank) for a in axis))


def parts_of(r: Record, first: Entry, main: int = 0) -> list[Entry]:
    """A tuple of which the graph explains one part."""
    return [first if i == main else Later(r, s if isinstance(s, tuple) else ()) for i, s in enumerate(r.shapes)]
