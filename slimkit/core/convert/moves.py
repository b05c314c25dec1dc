"""Conversion, decided: which tensor of one framework becomes which of the other, and how its layout changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint import placing
from slimkit.core.checkpoint.weightfile import Array, Entry, Piece, Weights
from slimkit.core.convert.slots import ROLES, Slot, slots
from slimkit.core.errors import PatternError, PlanError
from slimkit.core.match import bounded_regex
from slimkit.core.weights.names import pair_names

_TABLES = re.compile(r"(embed|\bemb\b|wte|wpe|lookup)", re.IGNORECASE)
_TO_MINDSPORE = {"running_mean": "moving_mean", "running_var": "moving_variance"}


@dataclass
class Move:
    """One tensor of the result: where it comes from, and how its layout changes."""

    source: str | None
    shape: tuple[int, ...]
    layout: str = ""  # "", "transpose" or "reshape"


# --- names by rule ---


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
            renamed[name] = path + dot + ROLES.get(role, role)
        elif role == "num_batches_tracked":
            continue
        elif role in _TO_MINDSPORE:
            renamed[name] = path + dot + _TO_MINDSPORE[role]
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


def match_slots(sources: Sequence[Slot], results: Sequence[Slot]) -> tuple[dict[str, str], dict[str, str]]:
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


def _layers(left: Sequence[Slot]) -> dict[Any, list[list[Slot]]]:
    """Layers by kind, roles and shapes, those of one signature in order."""
    paths: dict[str, list[Slot]] = {}
    for slot in left:
        paths.setdefault(slot.path, []).append(slot)
    found: dict[Any, list[list[Slot]]] = {}
    for layer in paths.values():
        kind = {"linear_t": "linear", "conv1d": "conv"}.get(layer[0].kind, layer[0].kind)
        shapes = sorted((s.role, tuple(n for n in _usual(s) if n != 1 or s.kind != "conv1d")) for s in layer)
        found.setdefault((kind, tuple(shapes)), []).append(layer)
    return found


def _usual(slot: Slot) -> tuple[int, ...]:
    """The shape as most layers have it: (out, in) for a matrix."""
    return slot.shape[::-1] if slot.kind == "linear_t" and len(slot.shape) == 2 else slot.shape


def _layout(source: Slot, result: Slot) -> str:
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


def _squeezed(slot: Slot) -> tuple[int, ...]:
    return (*slot.shape[:2], slot.shape[-1]) if len(slot.shape) == 4 and slot.shape[2] == 1 else slot.shape


# --- the whole job ---


@dataclass
class Job:
    """One conversion, decided and not yet done."""

    moves: dict[str, Move]
    report: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)  # name in the source network -> name in the file

    def entries(self, source: Weights) -> dict[str, Entry]:
        """What the result will hold."""
        return {n: Entry(source.entries[m.source].dtype if m.source else "I64", m.shape) for n, m in self.moves.items()}

    def tensors(self, source: Weights) -> Iterator[tuple[str, Array]]:
        """(name in the result, stored array), one at a time."""
        for name, move in self.moves.items():
            yield name, self.one(source, move)

    def one(self, source: Weights, move: Move) -> Array:
        """One tensor of the result."""
        if move.source is None:
            return np.zeros(move.shape, np.int64)
        array = source.raw(move.source)
        return array.T if move.layout == "transpose" else array.reshape(move.shape)

    def piece(self, source: Weights, move: Move) -> Any:
        """One tensor of the result for a file: passed on in chunks where its bytes stay in order."""
        if move.source is None or move.layout == "transpose":
            return self.one(source, move)
        return Piece(move.shape, source.piece(move.source).chunks)


def plan_conversion(
    source: Weights,
    to: str,
    source_net: Any = None,
    result_net: Any = None,
    name_map: Mapping[str, str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    strict: bool = True,
) -> Job:
    """Decide where every tensor goes, by the networks where both are given, by rules otherwise.

    Raises:
        PlanError: a tensor without a place or a source, or shapes that do not fit.
        PatternError: a map or function that matches nothing.
    """
    names, _ = placing.chosen_names(source.entries, None, choice_func)
    renamed = mapped(names, name_map)
    if len(set(renamed.values())) != len(renamed):
        twice = next(n for n, count in Counter(renamed.values()).items() if count > 1)
        raise PlanError(f"name_map gives the name {twice!r} to more than one tensor.")
    if source_net is None or result_net is None:
        return _by_rules(source, to, names, renamed, name_map)
    return _by_networks(source, slots(source_net), slots(result_net), names, renamed, strict=strict)


def _by_rules(
    source: Weights, to: str, names: Sequence[str], renamed: Mapping[str, str], name_map: Mapping[str, str] | None
) -> Job:
    asked = {n for n in name_map or () if not n.startswith("re:")}
    ruled = rule_names({renamed[n]: source.entries[n].shape for n in names if n not in asked}, to)
    moves: dict[str, Move] = {}
    for name in names:
        new = renamed[name] if name in asked else ruled.get(renamed[name])
        if new is None:
            continue
        if new in moves:
            raise PlanError(f"{moves[new].source!r} and {name!r} would both become {new!r}. Give a name_map.")
        moves[new] = Move(name, source.entries[name].shape)
    report = {
        "renamed": {m.source: n for n, m in moves.items() if m.source != n},
        "dropped": [n for n in names if n not in {m.source for m in moves.values()}],
    }
    return Job(moves, report)


def _by_networks(
    source: Weights,
    sources: list[Slot],
    results: list[Slot],
    names: Sequence[str],
    renamed: Mapping[str, str],
    *,
    strict: bool,
) -> Job:
    # A file name under the user's map may already be a name of the result; then it needs no matching.
    own = {s.name: s for s in sources}
    place = {r.name: r for r in results}
    direct = {renamed[n]: n for n in names if renamed[n] != n and renamed[n] in place}
    unknown = [n for n in names if renamed[n] != n and renamed[n] not in place and renamed[n] not in own]
    if unknown:
        raise PlanError(f"name_map turns {unknown[0]!r} into {renamed[unknown[0]]!r}, which neither network has.")
    known = {renamed[n]: n for n in names if renamed[n] not in direct}
    in_file = placing.match_names(list(own), list(known), suffixes=True)
    # A file may hold a shared tensor once: its other names are then fed from there.
    held_by = {s.same: in_file[s.name] for s in reversed(sources) if s.name in in_file}
    in_file |= {s.name: held_by[s.same] for s in sources if s.same in held_by and s.name not in in_file}
    held = [s for s in sources if s.name in in_file]
    found, by_order = match_slots(held, [r for r in results if r.name not in direct])
    by_name = own
    moves: dict[str, Move] = {}
    for result in results:
        if result.name in direct:
            moves[result.name] = _direct(source, direct[result.name], by_name, result)
        elif result.name in found:
            slot = by_name[found[result.name]]
            origin = known[in_file[slot.name]]
            if source.entries[origin].shape != slot.shape:
                raise PlanError(
                    f"{origin!r} has shape {list(source.entries[origin].shape)} in the file, {list(slot.shape)} in the "
                    "source network."
                )
            moves[result.name] = Move(origin, result.shape, _layout(slot, result))
    for result in results:
        twin = next((r.name for r in results if r.same == result.same and r.name in moves), None)
        if result.name not in moves and twin is not None:
            moves[result.name] = moves[twin]
    used = {m.source for m in moves.values()}
    zeros = [r.name for r in results if r.role == "num_batches_tracked" and r.name not in moves]
    moves.update({name: Move(None, place[name].shape) for name in zeros})
    counters = {s.name for s in sources if s.role == "num_batches_tracked"}
    groups = {known[in_file[s.name]]: s.same for s in held}
    written = {groups[n]: n for n in used if n in groups}
    twins = {n: written[group] for n, group in groups.items() if n not in used and group in written}
    left = [n for n in names if n not in used]
    dropped = [n for n in left if renamed[n] in counters or n.endswith("num_batches_tracked")]
    unused = [n for n in left if n not in dropped and n not in twins]
    tied = {n: next(r for r, m in moves.items() if m.source == twins[n]) for n in left if n in twins}
    missing = [r.name for r in results if r.name not in moves]
    if strict and (unused or missing):
        parts = [f"{len(unused)} tensors of the file found no place, such as {unused[0]!r}"] if unused else []
        parts += [f"{len(missing)} tensors of the network found no source, such as {missing[0]!r}"] if missing else []
        raise PlanError("; ".join(parts) + ". Name them in name_map, or pass strict=False to convert the rest.")
    return Job(
        {r.name: moves[r.name] for r in results if r.name in moves},
        {
            "renamed": {m.source: n for n, m in moves.items() if m.source not in (None, n)},
            "relaid": [n for n, m in moves.items() if m.layout],
            "dropped": dropped,
            "initialised": zeros,
            "tied": tied,
            "by_order": by_order,
            "unused": unused,
            "missing": missing,
        },
        {s.name: known[in_file[s.name]] for s in held},
    )


def _direct(source: Weights, origin: str, by_name: Mapping[str, Slot], result: Slot) -> Move:
    """A tensor that the user's map sends to its place: the layer's kind still decides the layout."""
    shape = source.entries[origin].shape
    kind = by_name[origin].kind if origin in by_name else result.kind
    return Move(origin, result.shape, _layout(Slot(origin, "", "", kind, shape), result))
