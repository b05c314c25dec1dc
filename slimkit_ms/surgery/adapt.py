"""What to do about code that does not go along with a cut: tie what it takes to be equal, or keep it whole."""

from __future__ import annotations

from collections.abc import Callable, Collection

from slimkit.core.prune.dims import FIXED, find, leaves, unify
from slimkit.core.prune.graph import Node
from slimkit.core.prune.solve import WRITTEN, Coupling, View
from slimkit_ms import bridge
from slimkit_ms.surgery import RefusedError
from slimkit_ms.trace import Traced

from mindspore import nn


class SizeSearch:
    """Narrows a coupling, step by step, until a model's code goes along with its cuts.

    Where the compiled graph shows the axis that came out wrong, that axis stays whole; where the compiler stopped at a
    layer, what that layer reads. The reason may also be that code such as mindcv's attention folds its heads back into
    the width of its input, so that both must stay equal: the next step ties them index by index, and the width is then
    pruned a head at a time. The last steps keep whole what the failing reshape was given, then whatever the class
    touches and cannot be cut.

    Args:
        model: the cell.
        traced: its trace.
        coupling: made from the trace's graph; changed in place.
    """

    def __init__(self, model: nn.Cell, traced: Traced, coupling: Coupling) -> None:
        self._model, self._traced, self.coupling = model, traced, coupling
        self._tied: set[type] = set()

    def narrow(self, refused: RefusedError, view: View, works: Callable[[Collection[str]], bool]) -> bool:
        """Take the next step for the class that refused.

        Args:
            refused: what went wrong.
            view: the variables that were cut.
            works: whether the code goes along when only some of them are, by name; it compiles.

        Returns:
            Whether anything was left to narrow.
        """
        name = refused.kind.__name__ if refused.kind else type(self._model).__name__
        relations = self.coupling.relations
        # Sums, so that every axis and every instance is treated.
        if sum(self.coupling.pin(relations.dims[n][axis], f"{WRITTEN} {name}") for n, axis in refused.axes):
            return True
        paths = [path for path, cell in self._model.cells_and_names() if type(cell) is refused.kind]
        if refused.child and sum(
            self._keep_read(f"{path}.{refused.child}".lstrip("."), name, view, works) for path in paths
        ):
            return True
        if refused.kind is not None and refused.kind not in self._tied:
            self._tied.add(refused.kind)
            if sum(map(self._tie, paths)):
                note = f"{name} folds its heads back into the width it is given: that width is pruned a head at a time"
                self.coupling.graph.notes.append(note)
                return True
        if sum(self.coupling.pin(relations.dims[n][axis], f"{WRITTEN} {name}") for n, axis in refused.near):
            return True
        return sum(self._keep_whole(path, name, view, works) for path in paths) > 0

    def _nodes(self, path: str) -> list[Node]:
        """What the cell's own code ran, and the layers it called."""
        inside = path + "." if path else ""
        cells = dict(self._model.cells_and_names())
        plain = {
            scope
            for scope, cell in cells.items()
            if scope != path and scope.startswith(inside) and bridge.is_plain_layer(cell)
        }
        return [n for n in self._traced.graph.nodes if n.scope == path or n.scope in plain]

    def _keep_read(self, path: str, name: str, view: View, works: Callable[[Collection[str]], bool]) -> bool:
        """Keep whole what one layer reads; of several variables those that are to blame."""
        read = [n.inputs[0] for n in self._traced.graph.nodes if n.scope == path and n.op in ("linear", "conv")]
        return self._keep({n for n in read if n is not None}, name, view, works)

    def _tie(self, path: str) -> bool:
        """Unify the width that the cell is given with what its own code hands on at the same width, index by index."""
        graph, dims = self._traced.graph, self.coupling.relations.dims
        nodes = self._nodes(path)
        own = {number for node in nodes for number in node.outputs}
        given = {
            number: find(dims[number][-1])
            for node in nodes
            for number in node.inputs
            if number is not None and number not in own and graph.values[number].kind == "result" and dims[number]
        }
        changed = False
        for width in given.values():
            if width.kind == FIXED:
                continue
            for node in nodes:
                # Folding heads back is a reshape of its own, or merged into that of the layer that follows.
                number = node.inputs[0] if node.op == "linear" else node.outputs[0] if node.op == "reshape" else None
                other = find(dims[number][-1]) if number is not None and dims[number] else width
                if other.size == width.size and find(width) is not other and other.kind != FIXED:
                    unify(width, other)
                    changed = True
        return changed

    def _keep_whole(self, path: str, name: str, view: View, works: Callable[[Collection[str]], bool]) -> bool:
        """Keep whole what the cell's code and its layers touch; of several variables those that are to blame."""
        nodes = self._nodes(path)
        touched = {n for node in nodes for n in (*node.inputs, *node.outputs) if n is not None}
        return self._keep(touched, name, view, works)

    def _keep(self, values: set[int], name: str, view: View, works: Callable[[Collection[str]], bool]) -> bool:
        dims = self.coupling.relations.dims
        found = dict.fromkeys(leaf for n in sorted(values) for d in dims[n] for leaf in map(find, leaves(d)))
        named = {leaf: e for leaf in found if isinstance(e := view.expression(leaf), str)}
        blamed = to_blame(sorted(set(named.values())), works)
        return sum(self.coupling.pin(leaf, f"{WRITTEN} {name}") for leaf, e in named.items() if e in blamed) > 0


def to_blame(names: list[str], works: Callable[[Collection[str]], bool], budget: int = 8) -> set[str]:
    """Which of several variables cannot be cut, by halving: too many rather than too few where proofs run out.

    Example:
        >>> sorted(to_blame(["a", "b", "c", "d"], lambda some: "c" not in some))
        ['c']
    """
    left = [budget]

    def search(some: list[str]) -> set[str]:
        if len(some) < 2:
            return set(some)
        halves = some[: len(some) // 2], some[len(some) // 2 :]
        found: set[str] = set()
        for half in halves:
            if left[0] == 0:
                return set(some)
            left[0] -= 1
            if not works(half):
                found |= search(half)
        return found or set(some)

    return search(names)
