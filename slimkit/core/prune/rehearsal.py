"""Where a rehearsed cut departs from the planned one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slimkit.core.prune.dims import FREE, Dim, find, leaves
from slimkit.core.prune.expressions import size_of
from slimkit.core.prune.graph import Graph, within
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.solve import View

COPIES = frozenset({"identity"})
LAYOUT = frozenset({"identity", "reshape", "transpose", "expand"})
ANOTHER = "another operator ran after the cut"
Axes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Contradiction:
    """What a model's code makes otherwise than a plan says, as far as a framework can tell.

    Values and operators are numbers of the traced graph.

    Args:
        what: what came, or the error that stopped the model.
        where: whose code it is: the path of a module, or a class.
        scopes: the modules whose code it is; several where it is a class.
        operator: the first operator that departs; None where only the code is known.
        instances: for each module of the class, the operators of its own code and of the layers it calls.
        reads: for each instance of the layer at which the code stopped, what it reads.
        axes: (value, axis) that came out with another size.
        near: (value, axis) of every value that has the shape that could not be taken.
    """

    what: str
    where: str
    scopes: tuple[str, ...] = ("",)
    operator: int | None = None
    instances: tuple[tuple[int, ...], ...] = ()
    reads: tuple[tuple[int, ...], ...] = ()
    axes: Axes = ()
    near: Axes = ()


@dataclass(frozen=True)
class Rehearsal:
    """What a cut model's trial run found.

    Args:
        contradiction: None where the code goes along with the plan.
        attributes: module -> attribute -> (before, after) that had to be written for that, beyond the plan's own.
    """

    contradiction: Contradiction | None = None
    attributes: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)


def compare(
    view: View, plan: PrunePlan, other: Graph, error: str | None, remade: set[str], branches: bool
) -> Contradiction | None:
    """Compare what the cut model ran with what was planned, operator by operator.

    Args:
        view: the coupling that the plan was made from.
        plan: what was planned.
        other: the cut model's graph, as far as it ran.
        error: what stopped the cut model.
        remade: modules that the cut remakes, whose operators are theirs.
        branches: whether the model's code chose by values, so that another way through it is no contradiction.
    """
    counts = view.counts | plan.counts
    if error is None:
        remade = remade | _fewer_rounds(view, counts, other)
    found = differences(view, other, counts, COPIES, error, remade)
    if found:
        # How a tensor lies in memory decides whether torch copies or views it; only the mathematics must agree.
        plain = differences(view, other, counts, LAYOUT, error, remade)
        if plain is None or found[1] == ANOTHER or len(other.nodes) > len(view.coupling.graph.nodes):
            found = plain
    if found is None or (found[1] == ANOTHER and branches and not error):
        return None
    place, what = found
    node = view.coupling.graph.nodes[place]
    return Contradiction(f"{what} in {node.op}", node.scope or "the model", (node.scope,), operator=place)


def _fewer_rounds(view: View, counts: Mapping[str, int], other: Graph) -> set[str]:
    """Modules whose code may run once an expert, where some experts go: what runs there is of another number."""
    cut = {v.layers[0] for v in view.variables if v.kind == "experts" and counts[v.name] < v.size}
    layers = [e.scope for e in view.coupling.experts if e.module in cut]
    scopes = {n.scope for graph in (view.coupling.graph, other) for n in graph.nodes} if layers else set()
    return {s for s in scopes if any(within(s, layer) for layer in layers)}


def differences(
    view: View, other: Graph, counts: Mapping[str, int], ignored: frozenset[str], error: str | None, remade: set[str]
) -> tuple[int, str] | None:
    """The first operator at which the rehearsed graph is not the planned one, and what came instead."""
    starts, others = [0, *view.coupling.graph.ends], [0, *other.ends]
    stops = [*starts[1:], len(view.coupling.graph.nodes)]
    for k, start in enumerate(starts[: max(1, len(starts) - 1)]):
        if k >= len(others):
            break
        ran = others[k + 1] if k + 1 < len(others) else len(other.nodes)
        mine, theirs = range(start, stops[k]), range(others[k], ran)
        last = error if k + 1 >= len(others) else None
        found = _pass_differs(view, other, counts, ignored, last, remade, mine, theirs)
        if found:
            return found
    return None


def _pass_differs(
    view: View,
    other: Graph,
    counts: Mapping[str, int],
    ignored: frozenset[str],
    error: str | None,
    remade: set[str],
    mine: Sequence[int],
    theirs: Sequence[int],
) -> tuple[int, str] | None:
    """The same for one forward pass, given the places of its nodes in both graphs."""
    graph, relations = view.coupling.graph, view.coupling.relations
    before = [k for k in mine if graph.nodes[k].op not in ignored and graph.nodes[k].scope not in remade]
    after = [n for n in (other.nodes[k] for k in theirs) if n.op not in ignored and n.scope not in remade]
    for place, twin in zip(before, after):
        node = graph.nodes[place]
        if twin.op != node.op or len(twin.outputs) != len(node.outputs):
            return place, ANOTHER
        for number, its in zip(node.outputs, twin.outputs):
            wrong = _wrong_size(view, relations.dims[number], other.values[its].shape, counts, ignored == LAYOUT)
            if wrong:
                return place, wrong
    if len(after) < len(before) or error:
        if not before:
            return (mine[0], error or "fewer operators ran") if len(mine) else None
        return before[min(len(after), len(before) - 1)], error or "fewer operators ran"
    return None


def _wrong_size(
    view: View, dims: Sequence[Dim], shape: Sequence[int], counts: Mapping[str, int], merged: bool
) -> str | None:
    """Where a shape departs from the planned one; `merged` lets the axes but the last be folded into one another, as
    torch does before a product whose input lies in one piece."""
    planned = [
        None
        if any(x.elastic and x.kind == FREE for x in map(find, leaves(dim)))
        else size_of(view.expression(dim), counts)
        for dim in dims
    ]
    sizes = list(shape)
    if merged and None not in planned and planned and sizes and len(planned) != len(sizes):
        planned = [math.prod(n for n in planned[:-1] if n is not None), planned[-1]]
        sizes = [math.prod(sizes[:-1]), sizes[-1]]
    for want, size in zip(planned, sizes):
        if want is not None and want != size:
            return f"{size} where {want} was planned"
    return None
