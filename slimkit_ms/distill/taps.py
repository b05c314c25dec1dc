"""Reading tensors inside a cell while it runs: noted in PyNative, by injected gradients in a graph."""

from __future__ import annotations

from typing import Any

from slimkit.core.distill.config import SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.errors import ConfigError
from slimkit_ms import bridge
from slimkit_ms.distill.losses import Terms

import mindspore as ms
from mindspore import nn, ops


class Noted(nn.Cell):
    """Stands where a cell stood, and notes what the labels ask for (PyNative).

    Args:
        cell: the cell itself, which keeps its parameters and their names.
        wants: (place of the label, side, index, path) for each label on this cell.
        seen: where the tensors go, by the label's place.
    """

    def __init__(self, cell: nn.Cell, wants: list[tuple[int, str, Any, str]], seen: dict[int, ms.Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.wants, self.seen = wants, seen

    def construct(self, *args, **kwargs):
        output = self.cell(*args, **kwargs)
        for place, side, index, path in self.wants:
            value = output
            if side == "input":
                value = kwargs if isinstance(index, str) else (*args, *kwargs.values())
            self.seen[place] = pick(value, index, f"{path} ({side})")
        return output


class Memory(nn.Cell):
    """What a compiled graph keeps of one inner label between the teacher's part and the student's.

    Args:
        name: prefix of the parameters' names.
        teacher: the teacher's tensor of an example, for its shape.
        mask: the mask of the example, or None.
        n_terms: number of losses.
    """

    def __init__(self, name: str, teacher: ms.Tensor, mask: ms.Tensor | None, n_terms: int) -> None:
        super().__init__(auto_prefix=False)

        def kept(values: Any, what: str) -> ms.Parameter:
            return ms.Parameter(values.astype(ms.float32), name=f"{name}.{what}", requires_grad=False)

        self.teacher = kept(teacher, "teacher")
        self.mask = kept(ops.ones((1,), ms.float32) if mask is None else mask, "mask")
        self.value = kept(ops.zeros((), ms.float32), "value")
        self.values = kept(ops.zeros((n_terms,), ms.float32), "values")


class Injected(nn.Cell):
    """The identity forward; backward adds the gradient of an inner label's losses to the hidden state's own.

    A compiled graph cannot hand an inner tensor to the outside, so its loss's gradient is put in where it arises. The
    factor covers what the graph multiplies the whole loss with (the share of the soft loss, a loss scale).
    """

    def __init__(self, terms: Terms) -> None:
        super().__init__(auto_prefix=False)
        self.terms = terms
        self.gradient = ops.GradOperation(get_all=True)

    def weighted(self, s, t, mask, projection):
        """The label's weighted loss."""
        return self.terms.weighted(s, t, mask, projection)

    def construct(self, s, t, mask, projection, factor):
        return s * 1.0

    def bprop(self, s, t, mask, projection, factor, out, dout):
        """(gradients of the five inputs)."""
        found = self.gradient(self.weighted)(s, t, mask, projection)
        return dout + found[0] * factor, t * 0.0, mask * 0.0, found[3] * factor, factor * 0.0


class Listener(nn.Cell):
    """One inner label on the student's side of a compiled graph."""

    def __init__(self, terms: Terms, memory: Memory, factor: ms.Parameter, projection: Any, index: int) -> None:
        super().__init__(auto_prefix=False)
        self.injected = Injected(terms)
        self.terms = terms
        self.memory = memory
        self.factor = factor
        self.projection = projection
        self.index = index

    def hear(self, s):
        """The hidden state with the injected gradient, its losses noted."""
        memory = self.memory
        s = self.injected(s, memory.teacher, memory.mask, self.projection, self.factor)
        shown = ops.stop_gradient(s)
        values = self.terms(shown, memory.teacher, memory.mask, self.projection)
        total = self.terms.weighted(shown, memory.teacher, memory.mask, self.projection)
        s = ops.depend(s, ops.assign(memory.value, total))
        return ops.depend(s, ops.assign(memory.values, ops.stack(values)))

    def construct(self, value):
        if isinstance(value, tuple):
            i = self.index
            return value[:i] + (self.hear(value[i]),) + value[i + 1 :]
        return self.hear(value)


class Teller(nn.Cell):
    """One inner label on the teacher's side of a compiled graph."""

    def __init__(self, memory: Memory, index: int) -> None:
        super().__init__(auto_prefix=False)
        self.memory = memory
        self.index = index

    def construct(self, value):
        told = value
        if isinstance(value, tuple):
            told = value[self.index]
        written = ops.assign(self.memory.teacher, told.astype(ms.float32))
        if isinstance(value, tuple):
            i = self.index
            return value[:i] + (ops.depend(told, written),) + value[i + 1 :]
        return ops.depend(told, written)


class Compiled(nn.Cell):
    """Stands where a cell stood in a compiled graph; passes its inputs and outputs through listeners or tellers."""

    def __init__(self, cell: nn.Cell, before: list[nn.Cell], after: list[nn.Cell]) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.before = nn.CellList(before, auto_prefix=False)
        self.after = nn.CellList(after, auto_prefix=False)
        self.has_before = bool(before)

    def construct(self, *args):
        if self.has_before:
            for listener in self.before:
                args = listener(args)
        output = self.cell(*args)
        for listener in self.after:
            output = listener(output)
        return output


def children(labels: tuple[SoftLabel, ...], role: str) -> dict[str, list[tuple[int, SoftLabel]]]:
    """module path -> the labels on it with their places, for role "t" or "s"."""
    found: dict[str, list[tuple[int, SoftLabel]]] = {}
    for place, label in enumerate(labels):
        path = label.read(role).module
        if path is not None:
            found.setdefault(path, []).append((place, label))
    return found


def replace(model: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Put a cell at a path, in place, leaving every parameter's name alone (unlike bridge.set_module)."""
    parent_path, _, child = path.rpartition(".")
    parent = bridge.get_module(model, parent_path) if parent_path else model
    parent._cells[child] = cell
    if isinstance(parent, nn.SequentialCell):
        parent.cell_list = list(parent._cells.values())


def find(model: nn.Cell, path: str, where: str) -> nn.Cell:
    """The cell at a path; ConfigError names the label."""
    try:
        return bridge.get_module(model, path)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def choose(value, index):
    """One output by position, key or path, in a form the graph compiler reads."""
    if index is None:
        return value
    if isinstance(index, tuple):
        for step in index:
            value = choose(value, step)
        return value
    # A tensor is the only output: indexing it would take a row of the batch.
    if isinstance(value, ms.Tensor):
        return value
    return value[index]


def width_of(x: Any) -> int:
    """Channels of a map, or the last axis."""
    return int(x.shape[1] if x.ndim == 4 else x.shape[-1])
