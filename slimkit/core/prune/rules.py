"""One rule for each operator of the neutral graph: how its axes relate to one another."""

from __future__ import annotations

from slimkit.core.prune import layer_rules, shape_rules
from slimkit.core.prune.custom import custom
from slimkit.core.prune.dims import fixed
from slimkit.core.prune.graph import Graph, Node
from slimkit.core.prune.relations import Dims, Relations, Rule
from slimkit.core.prune.unread import couple_unread


def _opaque(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    r.stay_whole(node, x)
    name = str(node.attrs.get("fn", node.op))
    return [
        [fixed(s, f"made by {name}, for which there is no rule") for s in r.shape(node, k)]
        for k in range(len(node.outputs))
    ]


RULES: dict[str, Rule] = {
    "elementwise": shape_rules.elementwise,
    "identity": shape_rules.identity,
    "reshape": shape_rules.reshape,
    "transpose": shape_rules.transpose,
    "expand": shape_rules.expand,
    "repeat": shape_rules.repeat,
    "concat": shape_rules.concat,
    "stack": shape_rules.stack,
    "split": shape_rules.split,
    "slice": shape_rules.slice,
    "select": shape_rules.select,
    "unbind": shape_rules.select,
    "pad": shape_rules.pad,
    "linear": layer_rules.linear,
    "matmul": layer_rules.matmul,
    "conv": layer_rules.conv,
    "norm": layer_rules.norm,
    "layer_norm": layer_rules.layer_norm,
    "group_norm": layer_rules.group_norm,
    "pool": layer_rules.pool,
    "reduce": shape_rules.reduce,
    "along": shape_rules.along,
    "embedding": layer_rules.embedding,
    "gather": layer_rules.gather,
    "scatter": layer_rules.scatter,
    "attention": layer_rules.attention,
    "pixel_shuffle": layer_rules.pixel_shuffle,
    "channel_shuffle": layer_rules.channel_shuffle,
    "unfold": layer_rules.unfold,
    "custom": custom,
    "opaque": _opaque,
}


def relate(graph: Graph) -> Relations:
    """Relate the axes of everything in a graph, of what did not run as well."""
    relations = Relations(graph, RULES)
    couple_unread(relations)
    return relations
