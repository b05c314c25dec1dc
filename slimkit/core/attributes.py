"""Which numbers written in modules and configurations speak of a pruned width, and what they should say afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from slimkit.core.solve import Expr, View, size_of

# old size -> label ("heads", "hidden", "width", "whole") -> sizes it becomes
Sizes = dict[int, dict[str, set[int]]]

# Numbers that never say a width, whatever they happen to equal.
_OTHER = re.compile(
    r"(^|_)(idx|index|id|ids|layer_id|layers|blocks|depth|window|patch|image|img|kernel|stride|padding|pad|dilation|vocab|"
    r"position|positions|pos|max|min|epochs?|seed|factor|ratio|rate|rep|group|groups|experts|labels|classes|version|dropout|"
    r"tokens?|top|eps|bits|scale|interval|steps?|step|buckets?|distance|resolution|length|seq|type|types)(_|$)|^_"
)


def scope_sizes(view: View, counts: Mapping[str, int]) -> dict[str, Sizes]:
    """For each module whose own code ran operators: the sizes it saw, and what they become."""
    graph, relations, full = view.coupling.graph, view.coupling.relations, view.counts
    kinds = {v.name: v.kind for v in view.variables}
    seen: dict[str, dict[str, Expr]] = {}
    for node in graph.nodes:
        here = seen.setdefault(node.scope, {})
        for number in (*node.outputs, *(i for i in node.inputs if i is not None)):
            for dim in relations.dims[number]:
                if dim.size > 1:
                    expr = view.expression(dim)
                    here[repr(expr)] = expr
    out: dict[str, Sizes] = {}
    for scope, exprs in seen.items():
        sizes: Sizes = {}
        for expr in exprs.values():
            for part, label in _parts(expr, kinds):
                old = size_of(part, full)
                new = size_of(part, counts)
                sizes.setdefault(old, {}).setdefault(label if isinstance(part, (str, list)) else "whole", set()).add(
                    new
                )
        out[scope] = sizes
    return out


def _parts(expr: Expr, kinds: Mapping[str, str]) -> Iterator[tuple[Expr, str]]:
    """An expression, its terms, and the products of its leading factors, each with what it is."""
    yield expr, _label(expr, kinds)
    if isinstance(expr, list):
        for place, part in enumerate(expr[1:], 1):
            yield from _parts(part, kinds)
            if expr[0] == "*" and 1 < place < len(expr) - 1:
                lead: Expr = ["*", *expr[1 : place + 1]]
                yield lead, "heads" if _label(expr[1], kinds) == "heads" else "width"
        if expr[0] == "*" and len(expr) > 3:
            yield ["*", *expr[2:]], "width"


def _label(expr: Expr, kinds: Mapping[str, str]) -> str:
    if isinstance(expr, int):
        return "whole"
    if isinstance(expr, str):
        return kinds.get(expr, "width")
    return "width"


def new_value(name: str, old: int, sizes: Sizes) -> int | None:
    """What an attribute should say after pruning, or None where it speaks of something else or cannot be told.

    Args:
        name: the attribute's name, a hint where one size has several futures.
        old: its value.
        sizes: what the module's code saw.

    Returns:
        The new value.

    Example:
        >>> new_value("num_heads", 8, {8: {"heads": {4}, "whole": {8}}})
        4
    """
    if _OTHER.search(name) or old not in sizes:
        return None
    labels = sizes[old]
    if re.search(r"(^|_)(heads?|nhead)$|^n_head|num_(attention|key_value)_heads|n_heads|kv_heads|nheads", name):
        wanted = ["heads"]
    elif "head" in name:
        return None  # head_dim, attention_head_size: the size of a head never changes
    elif re.search(r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$|model_dim|^embed", name):
        # all_head_size and embed_dim of an attention module may also mean heads * head size
        wanted = ["hidden", "width"] if "hidden" in labels else ["width"]
    else:
        wanted = ["width", "hidden"]
    for label in wanted:
        news = labels.get(label, set())
        if len(news) == 1:
            new = next(iter(news))
            if label != "heads" and "whole" in labels and old in labels["whole"] and new != old:
                continue
            return new if new != old else None
        if news:
            return None
    return None


def config_changes(fields: Mapping[str, int], view: View, counts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Fields of a model's configuration that one new value can say, with (before, after).

    Args:
        fields: the configuration's whole numbers.
        view: the coupling.
        counts: kept indices of each variable.

    Returns:
        The fields to rewrite; one whose layers now disagree is left out.
    """
    by_kind: dict[str, dict[int, set[int]]] = {"heads": {}, "hidden": {}, "width": {}}
    kv: dict[int, set[int]] = {}
    for scope in scope_sizes(view, counts).values():
        for old, labels in scope.items():
            for label, news in labels.items():
                if label == "heads":
                    kv.setdefault(old, set()).update(news)
    for variable in view.variables:
        by_kind[variable.kind].setdefault(variable.size, set()).add(counts[variable.name])
    by_kind["heads"] = kv
    whole = _whole_widths(view)
    out: dict[str, tuple[int, int]] = {}
    for name, old in fields.items():
        if _OTHER.search(name.replace("max_position", "max")):
            continue
        if re.search(r"heads?$|n_head$|nhead", name):
            news = by_kind["heads"].get(old, set())
        elif "head" in name:
            continue
        elif re.search(r"hidden_size|d_model|n_embd|embed_dim|^dim$|hidden_dim$|embedding_size", name):
            news = by_kind["hidden"].get(old, set()) or (set() if old in whole else by_kind["width"].get(old, set()))
        else:
            news = set() if old in whole else by_kind["width"].get(old, set())
        if len(news) == 1 and old not in news:
            out[name] = (old, next(iter(news)))
    return out


def _whole_widths(view: View) -> set[int]:
    """Sizes of layer outputs that stay whole: a field of that value may speak of them."""
    return {
        e
        for path, exprs in view.axes.items()
        for axis, e in enumerate(exprs)
        if isinstance(e, int) and view.coupling.relations.roles.get((path, axis)) == "out"
    }
