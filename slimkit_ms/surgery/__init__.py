"""A plan's kept indices -> a cut cell, proven by compiling it anew, or the cell as it was."""

from __future__ import annotations

import inspect
import linecache
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any

from slimkit.core.errors import GraphError
from slimkit.core.prune.cut_shapes import CutShapes
from slimkit.core.prune.rehearsal import Axes, Contradiction
from slimkit_ms import bridge
from slimkit_ms.surgery.layers import Keep, Undo, cut_layers, cut_parameters
from slimkit_ms.surgery.sizes import Attributes, SizeAttribute, Sizes, find_sizes, write_attributes
from slimkit_ms.trace import Mark, Traced, trace_marked

from mindspore import nn

__all__ = ["Attributes", "Keep", "Knife", "RefusedError", "Undo", "cut_by_attributes"]

# Choices of sizes tried for one class before its code counts as contradicting the cut.
_TRIES = 12


class RefusedError(Exception):
    """A class whose code does not go along with a cut, whatever its sizes are set to.

    Args:
        kind: the class; None where it is not known.
        why: what went wrong.
        axes: (number of a traced value, axis) that came out with another size; empty where the compiler stopped.
        child: the layer inside the class that the compiler stopped at; empty where it was none.
        near: axes, as above, of what a reshape that the compiler stopped at was given; empty where it was none.
    """

    def __init__(self, kind: type | None, why: str, axes: Axes = (), child: str = "", near: Axes = ()) -> None:
        super().__init__(why)
        self.kind, self.why, self.axes, self.child, self.near = kind, why, axes, child, near


def cut_by_attributes(model: nn.Cell, keep: Keep, groups: Mapping[str, int], attributes: Attributes) -> Undo:
    """Cut a cell, in place, with the sizes that its plan names, and without proof; on an error the cell is as it was.

    Args:
        model: the cell.
        keep: path of a parameter -> for each axis the kept indices, or None where all stay.
        groups: path of a grouped layer -> its number of groups after the cut.
        attributes: path of a cell -> attribute -> (before, after).

    Returns:
        What was replaced, to put it back.

    Raises:
        UnsupportedError: a parameter cannot be cut.
    """
    undo = Undo(model)
    try:
        cut_parameters(model, keep, undo)
        cut_layers(model, groups, undo)
        write_attributes(model, attributes, undo)
    except BaseException:
        undo.take_back()
        raise
    bridge.forget_graphs(model)
    return undo


class Knife:
    """Cuts one cell, and remembers what it learnt about the cell's classes.

    Args:
        model: the cell.
        inputs: what it was traced with.
        traced: its trace.

    Attributes:
        written: after a cut: path of a cell -> attribute -> (before, after), beyond what its own weights say.
    """

    def __init__(self, model: nn.Cell, inputs: Any, traced: Traced) -> None:
        self._model, self._inputs, self._traced = model, inputs, traced
        self._orders: dict[type, dict[SizeAttribute, int]] = {}
        self.written: Attributes = {}

    def cut(self, keep: Keep, groups: Mapping[str, int], planned: CutShapes, attributes: Attributes) -> Undo:
        """Cut the cell, in place, and prove the result by compiling it; on an error the cell is as it was.

        Args:
            keep: path of a parameter -> for each axis the kept indices, or None where all stay.
            groups: path of a grouped layer -> its number of groups after the cut.
            planned: the shapes of all traced values after the cut.
            attributes: sizes to try first: path of a cell -> attribute -> (before, after).

        Returns:
            What was replaced, to put it back.

        Raises:
            RefusedError: the code of some class does not go along with the cut.
            UnsupportedError: a parameter cannot be cut.
        """
        if attributes:
            undo = cut_by_attributes(self._model, keep, groups, attributes)
            if self._wrong(planned) is None:
                self.written = attributes
                return undo
            undo.take_back()
        undo = Undo(self._model)
        try:
            cut_parameters(self._model, keep, undo)
            sizes = find_sizes(self._model, self._traced, planned, undo)
            self._fit(sizes, groups, planned, undo)
            self.written = sizes.written(self._model)
        except BaseException:
            undo.take_back()
            raise
        bridge.forget_graphs(self._model)
        return undo

    def contradiction(self, refused: RefusedError) -> Contradiction:
        """The same in the words of the core: which operators of the traced graph the class ran."""
        paths = [path for path, cell in self._model.cells_and_names() if type(cell) is refused.kind]
        called = [f"{path}.{refused.child}".lstrip(".") for path in paths if refused.child]
        nodes = [n for n in self._traced.graph.nodes if n.op in ("linear", "conv")]
        reads = ({n.inputs[0]: None for n in nodes if n.scope == layer and n.inputs[0] is not None} for layer in called)
        return Contradiction(
            refused.why,
            refused.kind.__name__ if refused.kind else type(self._model).__name__,
            scopes=tuple(paths) or ("",),
            instances=tuple(map(self._operators, paths)),
            reads=tuple(tuple(values) for values in reads),
            axes=refused.axes,
            near=refused.near,
        )

    def _operators(self, path: str) -> tuple[int, ...]:
        """What the cell's own code ran, and the layers it called."""
        inside = path + "." if path else ""
        mine = {
            scope
            for scope, cell in self._model.cells_and_names()
            if scope != path and scope.startswith(inside) and bridge.is_plain_layer(cell)
        }
        return tuple(k for k, n in enumerate(self._traced.graph.nodes) if n.scope == path or n.scope in mine)

    def _fit(self, sizes: Sizes, groups: Mapping[str, int], planned: CutShapes, undo: Undo) -> None:
        """Set the sizes that cells compute with until the compiled graph has the shapes it must have, in place."""
        tried: dict[type, int] = defaultdict(int)
        first: dict[type | None, RefusedError] = {}
        chosen = dict(self._orders)
        while True:
            undo.take_back_attributes()
            cut_layers(self._model, groups, undo)
            sizes.write(self._model, chosen, undo)
            wrong = self._wrong(planned)
            if wrong is None:
                self._orders = chosen
                return
            kind = wrong.kind
            first.setdefault(kind, wrong)
            if kind is None:
                raise wrong
            orders = list(islice(sizes.orders(kind), _TRIES))
            tried[kind] += 1
            if tried[kind] >= len(orders):
                raise first[kind]
            chosen[kind] = orders[tried[kind]]

    def _wrong(self, planned: CutShapes) -> RefusedError | None:
        """The first class whose code makes another shape than it must, and what it made."""
        try:
            after = trace_marked(self._model, self._inputs).marks
        except GraphError as error:
            kind, child = self._blame(error)
            return RefusedError(kind, str(error), child=child, near=self._near(error, planned))
        made = _by_place(after)
        for place, marks in _by_place(self._traced.marks).items():
            others = made.get(place, [])
            if len(others) != len(marks):
                continue  # operators that do nothing to sizes of one are left out by the compiler
            for mark, other in zip(marks, others):
                for number, shape in zip(mark.values, other.shapes):
                    expected = planned.shape(number)
                    axes = tuple(
                        (number, axis)
                        for axis, (want, have) in enumerate(zip(expected, shape))
                        if want is not None and want != have
                    )
                    if axes:
                        why = f"{place[0] or 'the model'}: {mark.op} makes {shape} where it must make {expected}"
                        return RefusedError(self._owner(mark.scope), why, axes)
        return None

    def _near(self, error: GraphError, planned: CutShapes) -> Axes:
        """The changed axes of all values that have the shape that a reshape could not take."""
        told = re.search(r"x_shape: [^{]*\{([\d, ]+)\}", str(error))
        if not told:
            return ()
        shape = tuple(int(n) for n in told[1].split(","))
        return tuple(
            (number, axis)
            for mark in self._traced.marks
            for number, before in zip(mark.values, mark.shapes)
            if planned.shape(number) == shape
            for axis, (old, new) in enumerate(zip(before, shape))
            if old != new
        )

    def _owner(self, scope: str) -> type | None:
        """The class of the innermost cell around a scope whose code is not MindSpore's own."""
        cells = dict(self._model.cells_and_names())
        while True:
            cell = cells.get(scope)
            if cell is not None and not bridge.is_plain_layer(cell):
                return type(cell)
            if not scope:
                return None
            scope = scope.rpartition(".")[0]

    def _blame(self, error: GraphError) -> tuple[type | None, str]:
        """The innermost class that the compiler's report points at, and the layer that its code was calling."""
        kinds: dict[type, tuple[str, range]] = {}
        for _, cell in self._model.cells_and_names():
            if type(cell) not in kinds and not bridge.is_plain_layer(cell):
                try:
                    text, start = inspect.getsourcelines(type(cell))
                    kinds[type(cell)] = (inspect.getsourcefile(type(cell)) or "", range(start, start + len(text)))
                except (OSError, TypeError):
                    continue
        found: tuple[type | None, str] = (None, "")
        for file, line, first, last in re.findall(
            r"In file (\S+?):(\d+)[~\d]*(?:, (\d+)~(\d+))?", str(error.__cause__)
        ):
            for kind, (source, lines) in kinds.items():
                if source == file and int(line) in lines:
                    code = linecache.getline(file, int(line))[int(first or 0) : int(last or 0)]
                    called = re.match(r"self\.(\w+)\(", code)
                    found = kind, called[1] if called else ""
        return found


def _by_place(marks: list[Mark]) -> dict[tuple[str, str], list[Mark]]:
    places: dict[tuple[str, str], list[Mark]] = defaultdict(list)
    for mark in marks:
        places[mark.scope, mark.op].append(mark)
    return places
