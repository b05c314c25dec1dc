"""What a graph's operators say of one another's axes: a walk that applies one rule to each operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimkit.core.prune.dims import ONE, Dim, fix, fixed
from slimkit.core.prune.graph import Graph, Node

Dims = list[Dim]
Rule = Callable[["Relations", Node, list[Any]], list[Dims]]

_NUMBERS = re.compile(r"\d+")
SCALE = "inner size of attention, which its scale depends on"


class Relations:
    """Walks a graph once and relates the axes of everything in it.

    Args:
        graph: a traced model.
        rules: operator -> the rule that relates its axes.

    Attributes:
        dims: for each value, one axis expression a dimension.
        roles: (parameter, axis) -> "out", "in", "norm", "layer_norm", "bias" or "table".
        outs: parameter of a Conv or Linear -> the axis expression of the channels that layer makes.
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
        self.outs: dict[str, Dim] = {}
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
        for node in graph.nodes:
            self._relate(node)
        self._mirror_unused()
        for number in graph.outputs:
            for dim in self.dims[number]:
                fix(dim, "output of the model")
        for dim in self.scales:
            fix(dim, SCALE)

    def _mirror_unused(self) -> None:
        """Parameters that did not run follow the first one that did among those alike but for numbers in their names.

        An expert that the example did not reach must still fit the widths of those it did.
        """
        unused = [p for p in self.graph.shapes if p not in self.params]
        if not unused:
            return
        used: dict[tuple[str, tuple[int, ...]], str] = {}
        for path in self.params:
            used.setdefault((_NUMBERS.sub("#", path), self.graph.shapes[path]), path)
        for path in unused:
            twin = used.get((_NUMBERS.sub("#", path), self.graph.shapes[path]))
            if twin is not None and twin != path:
                self.params[path] = self.params[twin]
                for axis in range(len(self.graph.shapes[path])):
                    if (twin, axis) in self.roles:
                        self.roles[path, axis] = self.roles[twin, axis]
                self.graph.notes.append(f"{path} did not run; it is cut as {twin} is")

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
        # Looked-up rows are activations even where the tracer knows the indices.
        live = node.op == "embedding" or any(i is not None and self.live[i] for i in node.inputs)
        for number, dims in zip(node.outputs, results):
            shape = self.graph.values[number].shape
            if len(dims) != len(shape) or any(d.size != s for d, s in zip(dims, shape)):
                # A rule that disagrees with the tracer's shape knows less than it thinks.
                self.stay_whole(node, [*inputs, dims])
                dims = [fixed(s, f"unusual {node.op}") for s in shape]
            self.dims[number] = dims
            self.live[number] = live

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
        if number is not None and number in self.origin:
            self.outs.setdefault(self.origin[number][0], out)

    def stay_whole(self, node: Node, groups: Sequence[Dims | None]) -> None:
        name = str(node.attrs.get("fn", node.op))
        self.opaque.append((name, node.scope))
        for dims in groups:
            for dim in dims or ():
                fix(dim, f"touched by {name}, for which there is no rule")
