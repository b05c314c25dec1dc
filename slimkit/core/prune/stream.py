"""The residual stream of a model: what writes it, what reads it, and whether it may be turned.

Between its writers (tables, projections back) and its readers a stream is only added to and normalised by its root mean
square, which an orthogonal matrix does not change. Such a stream may stand on any axes (Ashkboos et al. 2024, SliceGPT,
sec. 3.1): with x' = Q^T x, and the scale g of each norm in what reads it,

    writer  W' = Q^T W,      table  E' = E Q,      reader  W' = W diag(g) Q,      g' = 1.

What writes and reads is found by walking the traced graph along one variable of the coupling; whatever else touches the
stream is the reason of a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slimkit.core.errors import UnsupportedError
from slimkit.core.prune.expressions import Expr, mentions
from slimkit.core.prune.graph import Graph, Node
from slimkit.core.prune.solve import View

# Operators that hand every index of the last axis on as it is.
_PASSING = frozenset({"identity", "reshape", "transpose", "expand", "slice", "select", "gather", "concat"})
_SUMS, _TIMES = frozenset({"add", "add_", "sub", "sub_"}), frozenset({"mul", "mul_"})
_OVER = frozenset({"div", "div_"})
_SAME = frozenset({"dropout", "neg", "native_dropout", "clone", "cast"})


@dataclass(frozen=True)
class StreamReader:
    """A weight that reads the stream.

    Args:
        path: of the weight.
        axis: along which it reads.
        norm: path of the scale that the stream is multiplied with before; "" for none.
    """

    path: str
    axis: int
    norm: str


@dataclass
class Stream:
    """A residual stream.

    Args:
        table: the weight of embeddings that writes it first.
        width: features.
        readers: what reads it.
        writers: (parameter, axis) of what writes it: tables, weights and biases.
    """

    table: str
    width: int
    readers: list[StreamReader] = field(default_factory=list)
    writers: list[tuple[str, int]] = field(default_factory=list)

    @property
    def norms(self) -> list[str]:
        """The scales of its norms."""
        return list(dict.fromkeys(r.norm for r in self.readers if r.norm))

    @property
    def tied(self) -> bool:
        """Whether the table is read as a matrix too, behind a scale that it cannot hold."""
        return any(r.path == self.table and r.norm for r in self.readers)

    def check_read_by(self, graph: Graph) -> None:
        """Refuse readers that are no layers of the graph, so that calibration could tell nothing of them.

        Raises:
            UnsupportedError: experts or a router read the stream; the message names them.
        """
        layers = {*graph.layers, *graph.further}
        for reader in self.readers:
            module = reader.path.rpartition(".")[0]
            if reader.path != self.table and module not in layers:
                raise UnsupportedError(
                    f"the residual stream cannot be turned: {reader.path} of {list(graph.shapes[reader.path])} reads "
                    "it, which is no layer of its own (experts and their routers are not turned)"
                )

    def variable(self, view: View) -> str | None:
        """Its variable in a view of the same graph, where it may be cut there."""
        expr = view.axes[self.table][1]
        return expr if isinstance(expr, str) else None


def find_stream(view: View) -> Stream:
    """The stream of a coupled model.

    Raises:
        UnsupportedError: there is none, or something in it depends on its axes; the message says what.
    """
    roles = view.coupling.relations.roles
    tables = {p: v for v in view.variables for p, a, _ in v.places if roles.get((p, 0)) == "table" and a == 1}
    names = {v.name for v in tables.values()}
    if len(names) != 1:
        found = "no hidden width that can be cut begins at a table of embeddings" if not names else "there are several"
        raise UnsupportedError(f"rotation needs one residual stream: {found}")
    table, variable = next(iter(tables.items()))
    walk = _Walk(view, variable.name, Stream(table, variable.size))
    for node in view.coupling.graph.nodes:
        walk.step(node)
    stream = walk.stream
    known = {(r.path, r.axis) for r in stream.readers} | set(stream.writers) | {(n, 0) for n in stream.norms}
    for path, axis, _ in variable.places:
        if (path, axis) not in known:
            raise UnsupportedError(f"the residual stream cannot be turned: how {path} meets it was not seen")
    return stream


class _Walk:
    """Follows a variable through a graph.

    Args:
        view: the coupling.
        name: the variable.
        stream: receives what is found.
    """

    def __init__(self, view: View, name: str, stream: Stream) -> None:
        self.view, self.name, self.stream = view, name, stream
        self.relations = view.coupling.relations
        # value -> "" the stream itself, a norm's path: multiplied with its scale, "square": its squares
        self.states: dict[int, str] = {}

    def exprs(self, number: int) -> list[Expr]:
        return [self.view.expression(d) for d in self.relations.dims[number]]

    def carries(self, number: int | None) -> bool:
        return number is not None and any(mentions(e, (self.name,)) for e in self.exprs(number))

    def refuse(self, node: Node, why: str) -> None:
        where = node.scope or "the model"
        raise UnsupportedError(f"the residual stream cannot be turned: {why} in {where}")

    def step(self, node: Node) -> None:
        carried = [n for n in node.inputs if n is not None and self.carries(n)]
        live = [n for n in carried if not self.relations.weight(n)]
        held = [n for n in carried if self.relations.weight(n)]
        made = [n for n in node.outputs if self.carries(n)]
        name = str(node.attrs.get("fn", node.op))
        if not carried and not made:
            return
        if not live and node.op in _PASSING and all(self.relations.weight(n) for n in node.outputs):
            return  # another layout of a weight
        if any(n not in self.states for n in live):
            self.refuse(node, f"{name} reads what no layer wrote")
        states = {self.states[n] for n in live}
        if node.op == "embedding" and held == [node.inputs[0]]:
            self.write(node, held[0])
        elif node.op in ("linear", "matmul"):
            self.product(node, live, held)
        elif node.op == "layer_norm" and not node.attrs.get("centred", True) and states == {""}:
            self.states[node.outputs[0]] = self.path(held[0]) if held else ""
        elif node.op == "elementwise":
            self.elementwise(node, name, live, held)
        elif node.op == "reduce" and len(live) == 1:
            last = len(self.exprs(live[0])) - 1
            if last not in node.attrs["axes"]:
                self.states.update(dict.fromkeys(node.outputs, self.states[live[0]]))
            elif states != {"square"} or name != "mean":
                told = "" if states == {"square"} else " (as LayerNorm takes one)"
                self.refuse(node, f"a {name} over its features{told}")
        elif node.op in _PASSING and len(states) == 1 and not held and all(map(self.last_only, node.outputs)):
            self.states.update(dict.fromkeys(node.outputs, states.pop()))
        else:
            self.refuse(node, "a LayerNorm" if node.op == "layer_norm" else f"{name}, which depends on its axes,")

    def last_only(self, number: int) -> bool:
        exprs = self.exprs(number)
        return bool(exprs) and exprs[-1] == self.name and not any(mentions(e, (self.name,)) for e in exprs[:-1])

    def path(self, number: int) -> str:
        return self.relations.origin[number][0]

    def write(self, node: Node, weight: int, bias: int | None = None) -> None:
        path = self.path(weight)
        axis = self.view.axes[path].index(self.name)
        self.stream.writers += [] if (path, axis) in self.stream.writers else [(path, axis)]
        if bias is not None and (self.path(bias), 0) not in self.stream.writers:
            self.stream.writers.append((self.path(bias), 0))
        self.states.update(dict.fromkeys(node.outputs, ""))

    def product(self, node: Node, live: list[int], held: list[int]) -> None:
        weights = [n for n in held if n == node.inputs[1]]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] in held else None
        path = self.path(weights[0]) if weights else ""
        if not weights or self.view.axes[path].count(self.name) != 1 or len(live) > 1:
            self.refuse(node, "a product with something else than a weight")
        axis = self.view.axes[path].index(self.name)
        reads = self.relations.roles.get((path, axis)) == "in" or path == self.stream.table
        if live and reads and not any(map(self.carries, node.outputs)):
            state = self.states[live[0]]
            if state == "square" or any(r.path == path and r.norm != state for r in self.stream.readers):
                self.refuse(node, f"{path} reads it in two ways")
            reader = StreamReader(path, axis, state)
            self.stream.readers += [] if reader in self.stream.readers else [reader]
        elif not live and not reads:
            self.write(node, weights[0], bias)
        else:
            self.refuse(node, f"{path} reads and writes it")

    def elementwise(self, node: Node, name: str, live: list[int], held: list[int]) -> None:
        states = [self.states[n] for n in live]
        others = [n for n in node.inputs if n is not None and n not in (*live, *held)]
        out: str | None = None
        if held and len(live) == len(held) == 1 and states == [""] and not others:
            path = self.path(held[0])
            if self.view.axes[path] == [self.name] and name in _TIMES:
                out = path
            elif self.view.axes[path] == [self.name] and name in ("add", "add_"):
                self.stream.writers += [] if (path, 0) in self.stream.writers else [(path, 0)]
                out = ""
        elif held:
            out = None
        elif states in ([""], ["", ""]) and (name == "square" or (name in _TIMES and live[1:] == live[:1])):
            out = "square"
        elif name in _SAME or (len(live) == 1 and (name in _TIMES or (name in _OVER and live[0] == node.inputs[0]))):
            out = states[0]
        elif name in _SUMS and not others and set(states) == {""}:
            out = ""
        if out is None:
            self.refuse(node, f"{name}, which depends on its axes,")
        assert out is not None
        self.states.update(dict.fromkeys(node.outputs, out))


def part(graph: Graph, table: str) -> str:
    """Let the matrix that shares a table's values be a parameter of its own in the graph, in place; returns its path.

    Raises:
        UnsupportedError: it is shared by more than one.
    """
    further = [path for path, first in graph.aliases.items() if first == table]
    if not further:
        raise UnsupportedError(
            f"the residual stream cannot be turned: {table} is read behind a norm's scale too, by code that holds no "
            "matrix of its own for it"
        )
    if len(further) != 1:
        raise UnsupportedError(f"{table} is shared by {len(further) + 1} modules: which of them reads the stream?")
    shared = {n for n, v in enumerate(graph.values) if v.kind == "param" and v.path == table}
    graph.shapes[further[0]] = graph.shapes[table]
    own = graph.add_value(graph.shapes[table], "param", further[0])
    del graph.aliases[further[0]]
    graph.parted.add(further[0])
    for node in graph.nodes:
        if node.op != "embedding":
            swapped: Any = tuple(own if n in shared else n for n in node.inputs)
            node.inputs = swapped
    return further[0]
