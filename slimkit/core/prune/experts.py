"""Experts: which axes of a model count them, as its configuration tells, and what it loses without some of them.

No list of families: a field of the configuration that speaks of experts is doubled, a model is built from it without
weights, and the axes that double with it are theirs: those of the router, its bias, and of the parameters that hold one
matrix an expert. A softmax or a top-k runs along them, which fixes any other axis; but where an expert and its row of
the router go together, what is left is what the router would do if it never chose that expert:

    softmax over the kept logits = softmax with the others at minus infinity

so that cutting is exact with respect to that. Nothing else about a layer of experts is known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.prune.dims import FREE, Dim, find, leaves
from slimkit.core.prune.graph import Graph, common_scope, within
from slimkit.core.prune.relations import Relations

Array = np.ndarray[Any, Any]
Field = int | float | list[int] | None  # as `attributes` has it, which reads this file
Build = Callable[[Mapping[str, Field]], Mapping[str, tuple[int, ...]] | None]
KEPT_WHOLE = 'experts: only data tells which of them can go (importance "output")'
# Why no plan may touch the experts of a module.
WHY_STAY = {
    "torch": "no configuration of Hugging Face's tells which axes count them",
    "mindspore": "cells carry no configuration that tells which axes count them. Prune experts in PyTorch, and convert "
    "the model",
}
GROUPED = "the router chooses among groups of them, which are told apart by their place"
NUMBER = re.compile(r"experts$")
# How many experts one token is given to: never more than there are.
CHOSEN = re.compile(r"experts_per_tok|(^|_)top_?k$")
_BLOCK = re.compile(r"^(.*\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Args:
        field: the configuration's field that says their number.
        number: of them.
        axes: (parameter, axis) of everything that counts them.
        module: the module that holds their matrices.
        scope: the module around it and its router.
        grouped: whether code sorts them into groups by their place: without some, others would change their group.
    """

    field: str
    number: int
    axes: tuple[tuple[str, int], ...]
    module: str
    scope: str
    grouped: bool = False


@dataclass(frozen=True)
class ExpertSignal:
    """What calibration tells of the experts of one layer.

    Args:
        squares: (experts, n_out) sum over the tokens of an expert of (its share times what it says) squared.
        slope: (n_out,) mean square of the loss's derivative by each output of the layer, at one token.
        rows: tokens in all.
    """

    squares: Array
    slope: Array
    rows: int


def find_experts(graph: Graph, fields: Mapping[str, Field], build: Build) -> list[Experts]:
    """The experts of every layer that a configuration speaks of.

    Args:
        graph: the traced model.
        fields: the configuration's numbers.
        build: builds a model of other values, without weights, and gives its shapes.
    """
    found: list[Experts] = []
    for field, value in fields.items():
        if not NUMBER.search(field) or type(value) is not int:
            continue
        other = build({field: 2 * value})
        layers: dict[str, list[tuple[str, int]]] = {}
        for path, shape in graph.shapes.items():
            for axis, (old, new) in enumerate(zip(shape, (other or {}).get(path, shape))):
                if (old, new) == (value, 2 * value):
                    block = _BLOCK.match(path)
                    layers.setdefault(block[0] if block else "", []).append((path, axis))
        for axes in layers.values():
            held = [path for path, axis in axes if axis == 0 and len(graph.shapes[path]) == 3]
            routed = any(len(graph.shapes[path]) == 2 and path.rpartition(".")[0] != held[0].rpartition(".")[0]
                         for path, _ in axes) if held else False  # fmt: skip
            if held and routed:
                scope = common_scope([path.rpartition(".")[0] for path, _ in axes])
                grouped = _sorted_into_groups(graph, scope, value)
                found.append(Experts(field, value, tuple(axes), held[0].rpartition(".")[0], scope, grouped))
    return found


def _sorted_into_groups(graph: Graph, scope: str, number: int) -> bool:
    """Whether a reshape in a layer of experts makes two axes of the one that counts them."""
    shapes = [
        (graph.values[node.inputs[0]].shape, graph.values[node.outputs[0]].shape)
        for node in graph.nodes
        if node.op == "reshape" and node.inputs[0] is not None and within(node.scope, scope)
    ]
    return any(
        before[-1:] == (number,) and before[:-1] == after[:-2] and len(after) > 1 and 1 not in after[-2:]
        for before, after in ((tuple(b), tuple(a)) for b, a in shapes)
    )


def free_experts(relations: Relations, found: Sequence[Experts]) -> dict[str, Dim]:
    """Let the experts of each layer be a variable, in place: module -> its axis.

    The axes of parameters that count them become one; what the layer's own code makes of their number (scores, sorted
    rows, offsets) is of any size, and a rehearsal of the cut runs it.
    """
    made: dict[str, Dim] = {}
    widths = {x for d in relations.made for x in map(find, leaves(d)) if x.kind == FREE}
    for experts in found:
        if any(path not in relations.params for path, _ in experts.axes):
            continue
        dim = made[experts.module] = Dim(experts.number)
        for path, axis in experts.axes:
            dims = list(relations.params[path])
            dims[axis] = dim
            relations.params[path] = dims
            relations.roles[path, axis] = "expert"
        relations.made.append(dim)
        relations.outs += [(path, dim) for path, _ in experts.axes if path.rpartition(".")[0] == experts.module]
    if made:
        _loosen(relations, [e for e in found if e.module in made], widths)
    return made


def _loosen(relations: Relations, found: Sequence[Experts], widths: set[Dim]) -> None:
    """Let what is made of the number of experts be of any size, in place: in their layers, and of scores outside."""
    graph, dims = relations.graph, relations.dims
    numbers = {e.scope: e.number for e in found}
    layers: dict[str, int] = {}
    for scope in {node.scope for node in graph.nodes}:
        layers[scope] = next((n for s, n in numbers.items() if within(scope, s)), 0)
    counting: set[Dim] = set()
    scores: set[int] = set()
    for node in graph.nodes:
        reads, number = any(i in scores for i in node.inputs), layers[node.scope]
        if not number and not reads:
            continue
        for out in node.outputs:
            fixed = [d.size > 1 and not any(x in widths for x in map(find, leaves(d))) for d in dims[out]]
            counting |= {find(d) for d, loose in zip(dims[out], fixed) if loose and d.size == number}
            if any(find(d) in counting for d in dims[out]) or (reads and all(fixed)):
                scores.add(out)
            dims[out] = [Dim(d.size, elastic=True) if loose else d for d, loose in zip(dims[out], fixed)]


def stay_notes(framework: str, modules: Iterable[str], grouped: Iterable[str]) -> list[str]:
    """What a report says of modules whose experts no plan may touch.

    Args:
        framework: whose modules they are.
        modules: those that hold experts which no plan may touch.
        grouped: those of them whose experts are sorted into groups.

    Example:
        >>> stay_notes("torch", ["h.0.moe", "h.1.moe", "h.2.moe"], [])[0].partition(":")[0]
        'the experts of h.0.moe, h.1.moe and 1 more stay whole'
    """
    by_reason: dict[str, list[str]] = {}
    known = {*grouped}
    for path in modules:
        by_reason.setdefault(GROUPED if path in known else WHY_STAY[framework], []).append(path or "the model")
    return [
        f"the experts of {', '.join(named[:2])}{f' and {len(named) - 2} more' if len(named) > 2 else ''} stay whole: "
        f"{why}"
        for why, named in by_reason.items()
    ]


def expert_losses(signal: ExpertSignal) -> Array:
    """The loss that a model has taken when each expert has gone, all those before it gone too.

    An expert j adds g_j f_j(x) to what its layer says, its share times what it says, for the tokens that it is given.
    Without it the model's loss rises by about

        1/2 sum_o s_o E (g_j f_j(x)_o)^2,      s_o = E (d loss / d y_o)^2

    over all tokens, as that of channels does (`elimination`), so that a plan can weigh experts against widths. The
    saliency of REAP (Lasby et al. 2025, sec. 4) is the mean of g_j |f_j(x)| over its own tokens; squares, how often it
    is asked, and what the model makes of it serve better where half of the experts go. What others say in its place,
    and the shares that they gain, is not counted.

    Args:
        signal: of the layer.

    Returns:
        (experts,) in the units of the loss, rising in the order in which they go.

    Example:
        >>> signal = ExpertSignal(np.array([[8.0], [2.0]]), np.ones(1), 4)
        >>> expert_losses(signal).tolist()
        [1.25, 0.25]
    """
    each = 0.5 * signal.squares @ signal.slope / max(signal.rows, 1)
    order = np.argsort(each, kind="stable")
    lost = np.empty(len(order))
    lost[order] = np.cumsum(each[order])
    return lost


def numbers_after(
    found: Iterable[Experts], kept: Mapping[str, int], numbers: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """What the attributes of layers whose experts were cut must say.

    Args:
        found: the experts.
        kept: module -> how many it keeps, of those that lose some.
        numbers: module -> its whole-number attributes.

    Returns:
        Module -> attribute -> (before, after).
    """
    out: dict[str, dict[str, tuple[int, int]]] = {}
    left = {e.scope: (e.number, kept.get(e.module, e.number)) for e in found}
    for module, held in numbers.items():
        # What stands around several layers (the model itself) can only say what all of them keep.
        near = {n for scope, n in left.items() if within(module, scope)}
        near = near or {n for scope, n in left.items() if within(scope, module)}
        if len(near) != 1:
            continue
        before, after = next(iter(near))
        for name, old in held.items() if after < before else ():
            if (NUMBER.search(name) and old == before) or (CHOSEN.search(name) and old > after):
                out.setdefault(module, {})[name] = (old, after)
    return out


def fields_after(
    found: Iterable[Experts], kept: Mapping[str, int], fields: Mapping[str, Field]
) -> dict[str, tuple[Field, Field]]:
    """The configuration's number of experts a token is given to, where fewer are left."""
    left: dict[str, set[int]] = {}
    for experts in found:
        left.setdefault(experts.field.rpartition(".")[0], set()).add(kept.get(experts.module, experts.number))
    out: dict[str, tuple[Field, Field]] = {}
    for field, value in fields.items():
        inside, _, name = field.rpartition(".")
        numbers = left.get(inside, set())
        if CHOSEN.search(name) and type(value) is int and len(numbers) == 1 and value > min(numbers):
            out[field] = (value, min(numbers))
    return out
