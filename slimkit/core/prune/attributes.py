"""Which numbers written in modules and configurations speak of a pruned width, and what they should say afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from slimkit.core.prune.solve import Expr, View, size_of

# old size -> label ("heads", "hidden", "width", "whole") -> sizes it becomes
Sizes = dict[int, dict[str, set[int]]]

_HEADS = re.compile(r"(^|_)n?heads?$|(^|_)n_head$|nhead")
_HIDDEN = re.compile(r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$|model_dim|embedding_size")
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


def new_values(name: str, old: int, sizes: Sizes) -> list[int]:
    """What an attribute may have to say after pruning, the likeliest first; its old value is among them.

    Args:
        name: the attribute's name, a hint where one size has several futures.
        old: its value.
        sizes: what the module's code saw.

    Returns:
        One value where it is certain; several where only trying can tell.

    Example:
        >>> new_values("num_heads", 8, {8: {"heads": {4}, "whole": {8}}})
        [4]
        >>> new_values("split_size", 64, {64: {"width": {48}, "whole": {64}}})
        [64, 48]
    """
    if _OTHER.search(name) or old not in sizes:
        return [old]
    labels = sizes[old]
    if _HEADS.search(name):
        return sorted(labels.get("heads", {old}))[:1] if len(labels.get("heads", ())) <= 1 else [old]
    if "head" in name and "all_head" not in name:
        return [old]  # head_dim, attention_head_size: the size of a head never changes
    order = ["hidden", "whole", "width"] if _HIDDEN.search(name) else ["whole", "width", "hidden"]
    values = [new for label in order for new in sorted(labels.get(label, ()))]
    return list(dict.fromkeys(values)) or [old]


def config_changes(
    fields: Mapping[str, int], view: View, counts: Mapping[str, int], scopes: Mapping[str, Sizes]
) -> dict[str, tuple[int, int]]:
    """Fields of a model's configuration that one new value can say, with (before, after).

    Args:
        fields: the configuration's whole numbers.
        view: the coupling.
        counts: kept indices of each variable.
        scopes: what `scope_sizes` gave for them.

    Returns:
        The fields to rewrite; one whose layers now disagree is left out.
    """
    by_kind: dict[str, dict[int, set[int]]] = {"heads": {}, "hidden": {}, "width": {}}
    kv: dict[int, set[int]] = {}
    for scope in scopes.values():
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
        if _HEADS.search(name):
            news = by_kind["heads"].get(old, set())
        elif "head" in name:
            continue
        elif _HIDDEN.search(name):
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
