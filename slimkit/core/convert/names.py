"""New names for a checkpoint's tensors: by rule, by the user's map, and by the layers of both networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimkit.core import check, naming
from slimkit.core.convert.slots import NamedTensor
from slimkit.core.errors import PatternError, PlanError
from slimkit.core.match import bounded_regex
from slimkit.core.weights.names import pair_names

_TABLES = re.compile(r"(embed|\bemb\b|wte|wpe|lookup)", re.IGNORECASE)


def rule_names(names: Mapping[str, tuple[int, ...]], to: str) -> dict[str, str]:
    """New names by what names and shapes say alone, for checkpoints whose networks are not at hand.

    Args:
        names: name -> shape in the source.
        to: "torch" or "mindspore".

    Returns:
        name -> new name; a name that the other framework does not have is left out.

    Example:
        >>> rule_names({"bn.weight": (4,), "bn.running_mean": (4,), "emb.weight": (9, 4)}, "mindspore")
        {'bn.weight': 'bn.gamma', 'bn.running_mean': 'bn.moving_mean', 'emb.weight': 'emb.embedding_table'}
    """
    renamed = {}
    for name, shape in names.items():
        path, dot, role = name.rpartition(".")
        if to == "torch":
            renamed[name] = naming.torch_name(name)
        elif role == "num_batches_tracked":
            continue
        elif role in naming.STATISTICS_TO_MINDSPORE:
            renamed[name] = path + dot + naming.STATISTICS_TO_MINDSPORE[role]
        elif role == "weight" and len(shape) == 1 and names.get(f"{path}{dot}bias", shape) == shape:
            renamed[name] = path + dot + "gamma"
        elif role == "bias" and len(names.get(f"{path}{dot}weight", ())) == 1:
            renamed[name] = path + dot + "beta"
        elif role == "weight" and len(shape) == 2 and _TABLES.search(path.rpartition(".")[2]):
            renamed[name] = path + dot + "embedding_table"
        else:
            renamed[name] = name
    return renamed


def mapped(names: Iterable[str], name_map: Mapping[str, str] | None) -> dict[str, str]:
    """Names after the user's map: whole names, or "re:" and a pattern whose replacement may use its groups.

    Example:
        >>> mapped(["enc.0.w", "x"], {r"re:enc\\.(\\d+)\\.": r"layer.\\1.", "x": "y"})
        {'enc.0.w': 'layer.0.w', 'x': 'y'}
    """
    names = list(names)
    found = {n: n for n in names}
    if name_map is None:
        return found
    check.instance(name_map, Mapping, "name_map", "a dict from names to names")
    for old, new in name_map.items():
        check.text(old, "a key of name_map")
        check.text(new, "a value of name_map")
        if old.startswith("re:"):
            expression = bounded_regex(old[3:], "name_map")
            hit = [n for n in names if expression.search(found[n])]
            try:
                found.update({n: expression.sub(new, found[n]) for n in hit})
            except (re.error, IndexError) as error:
                raise PatternError(f"name_map: {new!r} is no replacement for {old!r}: {error}") from None
        else:
            hit = [n for n in names if n == old]
            found.update(dict.fromkeys(hit, new))
        if not hit:
            raise PatternError(f"name_map must name tensors of the source. Received: {old!r}{check.near(old, names)}")
    return found


# --- names by the networks ---


def match_slots(
    sources: Sequence[NamedTensor], results: Sequence[NamedTensor]
) -> tuple[dict[str, str], dict[str, str]]:
    """Match the tensors of two networks: by name, under a common prefix, then layer by layer in order.

    Args:
        sources: slots of the one.
        results: slots of the other.

    Returns:
        name in the result -> name in the source; and path -> path of the layers matched by order.
    """
    by_key = {s.key: s for s in sources}
    pairs = {t: by_key[s] for t, s in pair_names([r.key for r in results], by_key).items()}
    found: dict[str, str] = {}
    for result in results:
        if result.key in pairs and _squeezed(pairs[result.key]) in (_squeezed(result), _squeezed(result)[::-1]):
            found.setdefault(result.name, pairs[result.key].name)
    taken = {s.same for s in sources if s.name in set(found.values())}
    left_sources = _layers([s for s in sources if s.same not in taken and s.role != "num_batches_tracked"])
    left_results = _layers([r for r in results if r.name not in found and r.role != "num_batches_tracked"])
    by_order: dict[str, str] = {}
    for signature, wanted in left_results.items():
        offered = left_sources.get(signature, [])
        # As many of one kind and shape on both sides, or the order says nothing.
        if len(offered) != len(wanted):
            continue
        for before, after in zip(offered, wanted, strict=True):
            roles = {slot.role: slot.name for slot in before}
            found.update({slot.name: roles[slot.role] for slot in after})
            by_order[before[0].path] = after[0].path
    return found, by_order


def _layers(left: Sequence[NamedTensor]) -> dict[Any, list[list[NamedTensor]]]:
    """Layers by kind, roles and shapes, those of one signature in order."""
    paths: dict[str, list[NamedTensor]] = {}
    for slot in left:
        paths.setdefault(slot.path, []).append(slot)
    found: dict[Any, list[list[NamedTensor]]] = {}
    for layer in paths.values():
        kind = {"linear_t": "linear", "conv1d": "conv"}.get(layer[0].kind, layer[0].kind)
        shapes = sorted((s.role, tuple(n for n in _usual(s) if n != 1 or s.kind != "conv1d")) for s in layer)
        found.setdefault((kind, tuple(shapes)), []).append(layer)
    return found


def _usual(slot: NamedTensor) -> tuple[int, ...]:
    """The shape as most layers have it: (out, in) for a matrix."""
    return slot.shape[::-1] if slot.kind == "linear_t" and len(slot.shape) == 2 else slot.shape


def layout_of(source: NamedTensor, result: NamedTensor) -> str:
    """How values get from one layer's layout to the other's; PlanError where they cannot."""
    if (source.kind == "linear_t") != (result.kind == "linear_t") and len(source.shape) == 2:
        if source.shape == result.shape[::-1]:
            return "transpose"
    elif source.shape == result.shape:
        return ""
    elif "conv1d" in (source.kind, result.kind) and _squeezed(source) == _squeezed(result):
        return "reshape"  # MindSpore's Conv1d holds (out, in, 1, width)
    raise PlanError(
        f"{source.name!r} has shape {list(source.shape)} in a layer {source.kind}, its place {result.name!r} has "
        f"{list(result.shape)} in a layer {result.kind}."
    )


def _squeezed(slot: NamedTensor) -> tuple[int, ...]:
    return (*slot.shape[:2], slot.shape[-1]) if len(slot.shape) == 4 and slot.shape[2] == 1 else slot.shape
