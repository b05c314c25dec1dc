"""The cache of keys and values that a decoder holds for each token, as a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slimkit.core.errors import ArgumentError
from slimkit.core.prune.allocate import Account, Array
from slimkit.core.prune.expressions import Expr
from slimkit.core.prune.graph import Node
from slimkit.core.prune.solve import View

# Operators that move numbers or repeat them, and make none.
_MOVES = frozenset({"identity", "reshape", "transpose", "expand", "repeat"})


class CacheAccount(Account):
    """Counts the numbers that attention reads as keys and values, each once where groups of queries share them.

    A width that none of them has stays whole.

    Args:
        view: the coupling.

    Raises:
        ArgumentError: the network has no attention.
    """

    def __init__(self, view: View) -> None:
        terms = list(cache_terms(view))
        if not terms:
            raise ArgumentError(
                'the budget "kv_cache" needs a decoder, whose attention reads keys and values. This network has none'
            )
        self._build(terms, view.counts)
        self._aligned = Account(view)

    def floors(self, sizes: Sequence[int] | Array, floor_ratio: float, alignment: int) -> Array:
        least = super().floors(sizes, floor_ratio, alignment)
        return np.where(self._slopes.any(axis=0), least, np.asarray(sizes, dtype=np.int64))


def cache_terms(view: View) -> Iterator[list[Expr]]:
    """For each key and value that attention reads, the axes of it before queries' groups repeat it."""
    graph, relations = view.coupling.graph, view.coupling.relations
    nodes = graph.nodes[: graph.ends[0] if graph.ends else len(graph.nodes)]
    made: dict[int, Node] = {number: node for node in nodes for number in node.outputs}
    for node in nodes:
        if node.op == "attention":
            read = node.inputs[1:3]
        elif node.op == "matmul" and all(n is not None and relations.live[n] for n in node.inputs[:2]):
            read = node.inputs[1:2]  # queries with keys, then shares with values
        else:
            continue
        for number in read:
            assert number is not None
            yield [view.expression(d) for d in relations.dims[_unrepeated(number, made)]]


def _unrepeated(number: int, made: dict[int, Node]) -> int:
    """The value that this one repeats, or itself."""
    found = number
    while (node := made.get(number)) is not None and node.op in _MOVES:
        (number,) = (n for n in node.inputs[:1] if n is not None)
        if node.op in ("expand", "repeat"):
            found = number
    return found
