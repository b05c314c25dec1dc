"""Which layers of a traced network are timed by their widths: their kind, and widths as expressions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from slimkit.core.prune.dims import Dim
from slimkit.core.prune.expressions import Expr, simplify
from slimkit.core.prune.graph import Graph, Node
from slimkit.core.prune.solve import View

# Operators that move or rename numbers and write none of their own.
_FREE = frozenset(
    {"identity", "reshape", "split", "slice", "select", "unbind", "transpose", "expand", "opaque", "custom"}
)
_TIMED = frozenset({"conv", "linear", "matmul", "attention"})


@dataclass(frozen=True)
class TimedLayer:
    """One layer that is timed.

    Args:
        kind: all of it but its widths, for people and as a key.
        n_in: width that it reads; of products of activations, how many there are (batch and heads).
        n_out: width that it makes.
        spec: the same as `kind`, as numbers: "op" and what a layer is built from.
    """

    kind: str
    n_in: Expr
    n_out: Expr
    spec: dict[str, Any] = field(compare=False)


def timed_layers(view: View) -> list[TimedLayer]:
    """Every layer of a network's first pass that is timed by itself, as they run."""
    return [layer for node in _first_pass(view.coupling.graph) for layer in _layer(view, node)]


def other_elements(view: View) -> list[list[Expr]]:
    """For each other operator that writes numbers, the axes of its first output."""
    dims = view.coupling.relations.dims
    return [
        [view.expression(d) for d in dims[node.outputs[0]]]
        for node in _first_pass(view.coupling.graph)
        if node.op not in _FREE and node.op not in _TIMED
    ]


def _first_pass(graph: Graph) -> list[Node]:
    return graph.nodes[: graph.ends[0] if graph.ends else len(graph.nodes)]


def _layer(view: View, node: Node) -> Iterator[TimedLayer]:
    if node.op not in _TIMED:
        return
    relations, graph = view.coupling.relations, view.coupling.graph

    def dims(number: int | None) -> list[Dim]:
        assert number is not None
        return relations.dims[number]

    def shape(number: int | None) -> tuple[int, ...]:
        assert number is not None
        return graph.values[number].shape

    if node.op == "conv":
        yield _conv(view, node, shape(node.inputs[0]), shape(node.inputs[1]), shape(node.outputs[0]))
    elif node.op == "attention":
        q, k, v = (shape(n) for n in node.inputs[:3])
        heads = simplify("*", [view.expression(d) for d in dims(node.inputs[0])[:2]])
        for m, inner, n in ((q[2], q[3], k[2]), (q[2], k[2], v[3])):
            yield _product(heads, m, inner, n)
    elif node.op == "matmul" and relations.live[node.inputs[0]] and relations.live[node.inputs[1]]:  # type: ignore[index]
        out = dims(node.outputs[0])
        a = shape(node.inputs[0])
        inner = (a[-2] if node.attrs.get("transpose_a") else a[-1]) if len(a) > 1 else a[-1]
        many = simplify("*", [view.expression(d) for d in out[:-2]]) if len(out) > 2 else 1
        yield _product(many, out[-2].size if len(out) > 1 else 1, inner, out[-1].size)
    else:
        x, y = dims(node.inputs[0]), dims(node.outputs[0])
        rows = math.prod(d.size for d in y[:-1])
        word = f"linear, {rows} row{'s' * (rows > 1)}"
        yield TimedLayer(word, view.expression(x[-1]), view.expression(y[-1]), {"op": "linear", "rows": rows})


def _product(many: Expr, m: int, inner: int, n: int) -> TimedLayer:
    spec = {"op": "matmul", "m": m, "inner": inner, "n": n}
    return TimedLayer(f"matmul, {m} x {inner} x {n}", many, 1, spec)


def _conv(view: View, node: Node, x: tuple[int, ...], weight: tuple[int, ...], y: tuple[int, ...]) -> TimedLayer:
    relations = view.coupling.relations
    groups, turned = int(node.attrs.get("groups", 1)), bool(node.attrs.get("transposed"))
    n_in = view.expression(relations.dims[node.inputs[0]][1])  # type: ignore[index]
    n_out = view.expression(relations.dims[node.outputs[0]][1])
    spec: dict[str, Any] = {
        "op": "conv", "batch": x[0], "kernel": list(weight[2:]), "in": list(x[2:]), "out": list(y[2:]),
        "transposed": turned, "in_a_group": x[1] // groups if groups > 1 else 0,
        "out_a_group": y[1] // groups if groups > 1 else 0,
    }  # fmt: skip
    sizes = ["x".join(map(str, spec[k])) for k in ("kernel", "in", "out")]
    word = f"conv{' transposed' * turned} {sizes[0]}, {sizes[1]} to {sizes[2]}, batch {x[0]}"
    if groups > 1:
        # The number of groups is what goes; what one group holds stays.
        word += f", groups of {spec['in_a_group']} to {spec['out_a_group']}"
        return TimedLayer(word, n_in, 1, spec)
    return TimedLayer(word, n_in, n_out, spec)
