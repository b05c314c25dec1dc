"""Where the graph of a rehearsed cut departs from the planned one."""

from __future__ import annotations

from collections.abc import Mapping

from slimkit.core.prune.dims import FREE, find, leaves
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.solve import View, size_of

COPIES = frozenset({"identity"})
LAYOUT = frozenset({"identity", "reshape", "transpose", "expand"})
ANOTHER = "another operator ran after the cut"


def differences(
    view: View, other: Graph, counts: Mapping[str, int], ignored: frozenset[str], error: str | None, remade: set[str]
) -> tuple[int, str] | None:
    """The first operator at which the rehearsed graph is not the planned one, and what came instead."""
    graph, relations = view.coupling.graph, view.coupling.relations
    before = [k for k, node in enumerate(graph.nodes) if node.op not in ignored and node.scope not in remade]
    after = [node for node in other.nodes if node.op not in ignored and node.scope not in remade]
    for place, twin in zip(before, after):
        node = graph.nodes[place]
        if twin.op != node.op or len(twin.outputs) != len(node.outputs):
            return place, ANOTHER
        for mine, theirs in zip(node.outputs, twin.outputs):
            for dim, size in zip(relations.dims[mine], other.values[theirs].shape):
                if any(x.elastic and x.kind == FREE for x in map(find, leaves(dim))):
                    continue
                planned = size_of(view.expression(dim), counts)
                if planned != size:
                    return place, f"{size} where {planned} was planned"
    if len(after) < len(before) or error:
        return (before[min(len(after), len(before) - 1)] if before else 0), error or "fewer operators ran"
    return None
