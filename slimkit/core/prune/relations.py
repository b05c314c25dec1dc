"""How the axes of everything in a graph relate: one walk over its operators, and what only the whole walk can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slimkit.core.prune.dims import FREE, ONE, Dim, find, fix, fixed, leaves
from slimkit.core.prune.graph import Graph, Node

Dims = list[Dim]
# rule(relations, node, axes of its inputs) -> axes of its outputs
Rule = Callable[["Relations", Node, list[Any]], list[Dims]]

SCALE = "inner size of attention, which its scale depends on"
UNREACHED = "only a part of it was read when the model ran"
# Operators whose results hold their inputs' indices side by side: one that nobody reads afterwards was not read.
_PASSING = frozenset(
    [
        "elementwise",
        "identity",
        "reshape",
        "transpose",
        "expand",
        "repeat",
        "concat",
        "stack",
        "slice",
        "split",
        "pad",
        "norm",
        "pool",
    ]
)
# Operators through which the scores of attention come to their softmax, and the shares to the values.
_CARRYING = frozenset(["elementwise", "identity", "reshape", "transpose", "expand", "concat", "slice", "pad", "split"])


_ACTIVATING = frozenset({"embedding", "attention", "layer_norm"})


class Partial(NamedTuple):
    """An axis of which a slice or split reads a part.

    Args:
        whole: the terms that the cut divides; without their rest they mean nothing.
        rest: the axes left out.
    """

    whole: list[Dim]
    rest: list[Dim]


class Score(NamedTuple):
    """A product that may turn out to be the scores of attention.

    Args:
        inner: the axis summed over, the size of a head.
        rows: rows of an operand that is a bare parameter: learned queries or memory slots.
    """

    inner: Dim
    rows: Dim | None


class Relations:
    """Walks a graph once and relates the axes of everything in it.

    Args:
        graph: a traced model.
        rules: one for each operator.

    Attributes:
        dims: for each value, one axis expression a dimension.
        roles: (parameter, axis) -> "out", "in", "norm", "layer_norm", "bias" or "table".
        outs: (parameter of a Conv or Linear, the axis expression of the channels that layer makes).
        made: axes that a layer or a table makes; nothing else is ever pruned.
        partial: axes of which a part was read.
        scores: value -> the products that it is made of, and that a softmax would make attention's scores.
        shares: value -> the same, after the softmax.
        groups: scope -> (attribute, group axis) of grouped convolutions and group norms.
        opaque: (operator, scope) of nodes that no rule covers.
        scales: inner axes of attention.
        averaged: axes over which a mean or a similar number is taken.
        costs: multiplications of one node, as a list of axis expressions to be multiplied.
    """

    def __init__(self, graph: Graph, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self._rules = rules
        self.dims: list[Dims] = [[] for _ in graph.values]
        self.live = [False] * len(graph.values)
        self.origin: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.outs: list[tuple[str, Dim]] = []
        self.made: list[Dim] = []
        self.partial: list[Partial] = []
        self.scores: dict[int, list[Score]] = {}
        self.shares: dict[int, list[Score]] = {}
        self.groups: dict[str, tuple[str, Dim]] = {}
        self.opaque: list[tuple[str, str]] = []
        self.costs: list[tuple[str, list[Dim]]] = []
        self.scales: list[Dim] = []
        self.averaged: list[Dim] = []
        self.params: dict[str, Dims] = {}
        for number, value in enumerate(graph.values):
            self.dims[number] = self._source(value.kind, value.path, value.shape)
            self.live[number] = value.kind == "input"
            if value.kind == "param":
                self.origin[number] = (value.path, tuple(range(len(value.shape))))
        first = graph.ends[0] if graph.ends else len(graph.nodes)
        for place, node in enumerate(graph.nodes):
            if place == first:
                counted = list(self.costs)
            self._relate(node)
        if first < len(graph.nodes):
            self.costs = counted
        self._keep_unreached()
        for number in graph.outputs:
            for dim in self.dims[number]:
                fix(dim, "output of the model")
        for dim in self.scales:
            fix(dim, SCALE)

    def _keep_unreached(self) -> None:
        """Keep whole what slices left out and nobody else reads: another example reads other parts of it."""
        read = {i for node in self.graph.nodes for i in node.inputs} | set(self.graph.outputs)
        for node in self.graph.nodes:
            if node.op == "split" and any(n not in read for n in node.outputs):
                axis, number = node.attrs["axis"], node.inputs[0]
                rest = [self.dims[n][axis] for n in node.outputs if n not in read]
                table = number is not None and not self.live[number]
                self.partial.append(Partial([self.dims[number][axis]] if table else [], rest))  # type: ignore[index]
        wanted = {x for p in self.partial for d in p.rest for x in map(find, leaves(d)) if x.kind == FREE}
        if not wanted:
            return
        reached = self._reached(wanted)
        for part in self.partial:
            left_out = [x for d in part.rest for x in map(find, leaves(d)) if x.kind == FREE and x not in reached]
            for dim in (*left_out, *part.whole) if left_out else ():
                fix(dim, UNREACHED)

    def _reached(self, wanted: set[Dim]) -> set[Dim]:
        """Those of some variables that an operator takes in, or the model gives out, walking from its outputs back."""
        of = [{x for d in dims for x in map(find, leaves(d)) if x in wanted} for dims in self.dims]
        needed: dict[int, set[Dim]] = {n: set(of[n]) for n in self.graph.outputs}
        reached: set[Dim] = set().union(*needed.values())
        for node in reversed(self.graph.nodes):
            out: set[Dim] = set().union(*(needed.get(n, set()) for n in node.outputs))
            passed: set[Dim] = set().union(*(of[n] for n in node.outputs))
            for number in node.inputs:
                if number is None or not of[number]:
                    continue
                here = of[number]
                if node.op in _PASSING and node.attrs.get("fn") != "copy":
                    here = {x for x in here if x in out or (x not in passed and node.op not in ("slice", "split"))}
                needed.setdefault(number, set()).update(here)
                reached |= here
        return reached

    def _source(self, kind: str, path: str, shape: tuple[int, ...]) -> Dims:
        if kind == "param":
            if path not in self.params:
                self.params[path] = [Dim(s) if s != 1 else ONE for s in shape]
            return self.params[path]
        if kind == "uniform":
            return [Dim(s, elastic=True) if s != 1 else ONE for s in shape]
        if kind == "result":
            return []
        why = "input of the model" if kind == "input" else "constant made in the model's code"
        return [fixed(s, why) for s in shape]

    def _relate(self, node: Node) -> None:
        inputs: list[Any] = [None if i is None else self.dims[i] for i in node.inputs]
        results = self._rules[node.op](self, node, inputs)
        # Looked-up rows are activations even where the tracer knows the indices; so is what attention mixes.
        live = node.op in _ACTIVATING or any(i is not None and self.live[i] for i in node.inputs)
        if self.scores or self.shares:
            self._carry(node)
        for number, dims in zip(node.outputs, results):
            shape = self.graph.values[number].shape
            if len(dims) != len(shape) or any(d.size != s for d, s in zip(dims, shape)):
                # A rule that disagrees with the tracer's shape knows less than it thinks.
                self.stay_whole(node, [*inputs, dims])
                dims = [fixed(s, f"unusual {node.op}") for s in shape]
            self.dims[number] = dims
            self.live[number] = live

    def _carry(self, node: Node) -> None:
        """Hand products on to what is made of them, and make them attention's scores at a softmax."""
        softmax = node.op == "along" and "softmax" in str(node.attrs.get("fn", "")).lower()
        if not softmax and node.op not in _CARRYING:
            return
        for store, to in ((self.scores, self.shares if softmax else self.scores), (self.shares, self.shares)):
            found = [s for i in node.inputs if i is not None for s in store.get(i, ())]
            for number in node.outputs if found else ():
                to.setdefault(number, []).extend(found)

    def attends(self, number: int | None, values: Dim, bare: bool = True) -> None:
        """Shares of attention meet `values`: the products behind them were scores, whose inner size stays whole.

        A softmax written by hand, a sigmoid or nothing makes shares as well where no operand, `values` among them, is a
        bare parameter (else relu(x @ w) @ v would be attention).
        """
        if number is None:
            return
        written = [] if bare else [s for s in self.scores.get(number, ()) if s.rows is None]
        for score in (*self.shares.get(number, ()), *written):
            self.scales.append(score.inner)
            if score.rows is not None:
                fix(score.rows, "learned queries or memory slots of attention")
            for leaf in leaves(values):
                leaf.inner = True

    def weight(self, number: int | None) -> bool:
        """Whether a value is a parameter, or a part or another layout of one."""
        return number is not None and number in self.origin

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        return self.graph.values[node.outputs[output]].shape

    def role(self, number: int | None, axis: int, role: str) -> None:
        """Remember what a parameter's axis is for, seen through transposes."""
        if number is not None and number in self.origin:
            path, axes = self.origin[number]
            if axis < len(axes):
                self.roles.setdefault((path, axes[axis]), role)

    def layer(self, number: int | None, out: Dim) -> None:
        """Remember which channels the layer of a weight makes."""
        self.made.append(out)
        if number is not None and number in self.origin:
            self.outs.append((self.origin[number][0], out))

    def stay_whole(self, node: Node, groups: Sequence[Dims | None]) -> None:
        name = str(node.attrs.get("fn", node.op))
        self.opaque.append((name, node.scope))
        for dims in groups:
            for dim in dims or ():
                fix(dim, f"touched by {name}, for which there is no rule")


def layer_of(path: str) -> str:
    """The layer that a parameter belongs to, behind torch's parametrizations too.

    Example:
        >>> layer_of("conv.weight"), layer_of("conv.parametrizations.weight.original1")
        ('conv', 'conv')
    """
    return path.partition(".parametrizations.")[0] if ".parametrizations." in path else path.rpartition(".")[0]
