"""Which numbers written in modules and configurations speak of a pruned width, and what they should say afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from slimkit.core.prune.experts import NUMBER
from slimkit.core.prune.expressions import Expr, size_of
from slimkit.core.prune.solve import View

# What a field of a configuration may hold.
Field = int | float | list[int] | None
# old size -> label ("heads", "hidden", "width", "whole") -> sizes it becomes
Sizes = dict[int, dict[str, set[int]]]

HEADS = re.compile(r"(^|_)n?heads?$|(^|_)n_head$|nhead")
HIDDEN = re.compile(r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$|model_dim|embedding_size|embed_proj_dim")
# Lists of one number a stage.
WIDTHS = re.compile(r"hidden|width|channel|dim|sizes|planes|filters|heads")
# Widths relative to another one.
RATIOS = re.compile(r"(mlp|ffn)_ratio$")
# Fields that mean four times the hidden size when they are None.
FOUR_TIMES = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
# Numbers that never say a width, whatever they happen to equal.
OTHER = re.compile(
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
            for part, label in parts_of(expr, kinds):
                old = size_of(part, full)
                new = size_of(part, counts)
                sizes.setdefault(old, {}).setdefault(label if isinstance(part, (str, list)) else "whole", set()).add(
                    new
                )
        out[scope] = sizes
    return out


def parts_of(expr: Expr, kinds: Mapping[str, str]) -> Iterator[tuple[Expr, str]]:
    """An expression, its terms, and the products of its leading factors, each with what it is."""
    yield expr, _label(expr, kinds)
    if isinstance(expr, list):
        for place, part in enumerate(expr[1:], 1):
            yield from parts_of(part, kinds)
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
        One value where it is certain; several where only trying can show.

    Example:
        >>> new_values("num_heads", 8, {8: {"heads": {4}, "whole": {8}}})
        [4]
        >>> new_values("split_size", 64, {64: {"width": {48}, "whole": {64}}})
        [64, 48]
        >>> new_values("h", 8, {8: {"heads": {4}}})
        [8, 4]
    """
    if OTHER.search(name) or old not in sizes:
        return [old]
    labels = sizes[old]
    if HEADS.search(name):
        return sorted(labels.get("heads", {old}))[:1] if len(labels.get("heads", ())) <= 1 else [old]
    if "head" in name and "all_head" not in name:
        return [old]  # head_dim, attention_head_size: the size of a head never changes
    order = ["hidden", "whole", "width"] if HIDDEN.search(name) else ["whole", "width", "hidden"]
    values = [new for label in order for new in sorted(labels.get(label, ()))]
    if "heads" in labels:
        values += [
            old,
            *sorted(labels["heads"]),
        ]  # `self.h = 8` may be the number of heads: tried where nothing else runs
    return list(dict.fromkeys(values)) or [old]


def counts_heads_unseen(name: str, old: int, sizes: Sizes) -> bool:
    """Whether an attribute counts heads by its name, and the module's own code met none of that number.

    Example:
        >>> counts_heads_unseen("n_heads", 8, {64: {"hidden": {48}}}), counts_heads_unseen("width", 8, {})
        (True, False)
    """
    return bool(HEADS.search(name)) and "heads" not in sizes.get(old, {})


def widths_of(fields: Mapping[str, object]) -> dict[str, Field]:
    """The fields of a configuration that may say a width: whole numbers above one, lists of them, ratios, and None.

    A configuration inside another one (`text_config`) gives its fields with its name before them.

    Example:
        >>> widths_of({"hidden_sizes": (32, 64), "n_inner": None, "layer_norm_eps": 1e-5, "use_cache": True})
        {'hidden_sizes': [32, 64], 'n_inner': None}
    """
    out: dict[str, Field] = {}
    for name, value in fields.items():
        if name.startswith("_"):
            continue
        if value is None or (type(value) is int and value > 1) or (isinstance(value, float) and RATIOS.search(name)):
            out[name] = value
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            out[name] = list(value)
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            out.update({f"{name}.{inner}": v for inner, v in widths_of(vars(value)).items()})
    return out


def rewritten(config: object, changes: Mapping[str, tuple[Field, Field]]) -> list[tuple[object, str, object]]:
    """The fields that a plan rewrites, in the types the configuration holds them in; fields that differ are left out.

    Args:
        config: the configuration object.
        changes: field -> (before, after), as a plan says them.

    Returns:
        (the configuration, or the one inside it, that holds the field; the attribute; the new value) of each.
    """
    out: list[tuple[object, str, object]] = []
    for path, (old, new) in changes.items():
        *inside, name = path.split(".")
        owner = config
        for part in inside:
            owner = getattr(owner, part, None)
        # A field that is not there says as little as one that is None.
        held = getattr(owner, name, None)
        if owner is None:
            continue
        if isinstance(held, (list, tuple)) and isinstance(new, list) and list(held) == old:
            out.append((owner, name, type(held)(new)))
        elif held == old:
            out.append((owner, name, new))
    return out


def config_changes(
    fields: Mapping[str, Field], view: View, counts: Mapping[str, int], scopes: Mapping[str, Sizes]
) -> dict[str, tuple[Field, Field]]:
    """Fields of a model's configuration that one new value can say, with (before, after).

    Args:
        fields: the configuration's whole numbers, lists of them, and fields left None.
        view: the coupling.
        counts: kept indices of each variable.
        scopes: what `scope_sizes` gave for them.

    Returns:
        The fields to rewrite; one whose layers now disagree is left out.
    """
    by_kind: dict[str, dict[int, set[int]]] = {"heads": {}, "hidden": {}, "width": {}, "experts": {}}
    for variable in view.variables:
        by_kind[variable.kind].setdefault(variable.size, set()).add(counts[variable.name])
    by_kind["heads"] = {}
    for scope in scopes.values():
        for size, labels in scope.items():
            if "heads" in labels:
                by_kind["heads"].setdefault(size, set()).update(labels["heads"])
    whole = _whole_widths(view)
    out: dict[str, tuple[Field, Field]] = {}
    for name, old in fields.items():
        new: Field = old
        if isinstance(old, int):
            new = _new_field(name, old, by_kind, whole)
        elif isinstance(old, list) and WIDTHS.search(name):
            new = [_new_field(name, width, by_kind, whole) for width in old]
        elif old is None and name in FOUR_TIMES:
            hidden = next((v for f, v in fields.items() if isinstance(v, int) and HIDDEN.search(f)), 0)
            inner = _new_field(name, 4 * hidden, by_kind, whole)
            new = inner if inner != 4 * hidden else None
        if new != old:
            out[name] = (old, new)
    return out


def _new_field(name: str, old: int, by_kind: Mapping[str, Mapping[int, set[int]]], whole: set[int]) -> int:
    """The one size that the layers of this old size now have, or the old one."""
    if NUMBER.search(name):
        left = by_kind["experts"].get(old, set())
        return next(iter(left)) if len(left) == 1 else old
    if OTHER.search(name.replace("max_position", "max")):
        return old
    width = set() if old in whole else by_kind["width"].get(old, set())
    if HEADS.search(name):
        news = by_kind["heads"].get(old, set())
    elif "head" in name:
        return old
    elif HIDDEN.search(name):
        news = by_kind["hidden"].get(old, set()) or width
    else:
        news = width
    return next(iter(news)) if len(news) == 1 else old


def _whole_widths(view: View) -> set[int]:
    """Sizes of layer outputs that stay whole: a field of that value may speak of them."""
    return {
        e
        for path, exprs in view.axes.items()
        for axis, e in enumerate(exprs)
        if isinstance(e, int) and view.coupling.relations.roles.get((path, axis)) == "out"
    }
