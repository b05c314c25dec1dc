"""Conversion, decided: which tensor of one framework becomes which of the other, and how its layout changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint import loading
from slimkit.core.checkpoint.weightfile import Array, Entry, Piece, Weights
from slimkit.core.convert.fused import Fusion, Told, find_fusions, row_spans, told_fusions, told_names
from slimkit.core.convert.names import layout_of, mapped, match_slots, rule_names
from slimkit.core.convert.slots import NamedTensor, slots
from slimkit.core.errors import PlanError


@dataclass
class Move:
    """One tensor of the result: where it comes from, and how its layout changes."""

    source: str | None
    shape: tuple[int, ...]
    layout: str = ""  # "", "transpose" or "reshape"
    rows: tuple[int, int] | None = None  # of the source as (out, in), where this is one part of a fused tensor
    joined: tuple[str, ...] = ()  # further sources, whose rows follow

    @property
    def sources(self) -> tuple[str, ...]:
        """All tensors of the file that this one is made of."""
        return () if self.source is None else (self.source, *self.joined)


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
        if move.joined:
            array = np.concatenate([source.raw(name) for name in move.sources])
        else:
            array = source.raw(move.source)
        array = array.T if move.layout == "transpose" else array
        return (array if move.rows is None else array[slice(*move.rows)]).reshape(move.shape)

    def piece(self, source: Weights, move: Move) -> Any:
        """One tensor of the result for a file: passed on in chunks where its bytes stay in order."""
        if move.source is None or move.layout == "transpose" or move.rows or move.joined:
            return self.one(source, move)
        return Piece(move.shape, source.piece(move.source).chunks)


def plan_conversion(
    source: Weights,
    to: str,
    source_net: Any = None,
    result_net: Any = None,
    name_map: Mapping[Any, Any] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    strict: bool = True,
) -> Job:
    """Decide where every tensor goes, by the networks where both are given, by rules otherwise.

    Raises:
        PlanError: a tensor without a place or a source, or shapes that do not fit.
        PatternError: a map or function that matches nothing.
    """
    names, _ = loading.chosen_names(source.entries, None, choice_func)
    plain, told = told_fusions(names, name_map)
    apart = told_names(told)
    renamed = mapped([n for n in names if n not in apart], plain)
    if len(set(renamed.values())) != len(renamed):
        twice = next(n for n, count in Counter(renamed.values()).items() if count > 1)
        raise PlanError(f"name_map gives the name {twice!r} to more than one tensor.")
    if source_net is None or result_net is None:
        return _by_rules(source, to, list(renamed), renamed, plain, told)
    return _by_networks(source, slots(source_net), slots(result_net), list(renamed), renamed, told, strict=strict)


def _by_rules(
    source: Weights,
    to: str,
    names: Sequence[str],
    renamed: Mapping[str, str],
    name_map: Mapping[str, str],
    told: Told,
) -> Job:
    asked = {n for n in name_map if not n.startswith("re:")}
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
    for new, move in _told_moves(source, told).items():
        if new in moves:
            raise PlanError(f"{moves[new].source!r} and {move.source!r} would both become {new!r} by the name_map.")
        moves[new] = move
    return Job(moves, {**report, **_fused_report(moves)})


def _told_moves(source: Weights, told: Told) -> dict[str, Move]:
    """What the user's map splits and joins, where no network names the layers."""
    moves: dict[str, Move] = {}
    for name, wanted in told.splits.items():
        shape = source.entries[name].shape
        for new, rows in row_spans(name, shape[0] if shape else 0, wanted).items():
            moves[new] = Move(name, (rows[1] - rows[0], *shape[1:]), rows=rows)
    for new, parts in told.joins.items():
        shapes = [source.entries[n].shape for n in parts]
        if any(not s or s[1:] != shapes[0][1:] for s in shapes):
            raise PlanError(f"{list(parts)} cannot be joined to {new!r}: their shapes are {[list(s) for s in shapes]}.")
        moves[new] = Move(parts[0], (sum(s[0] for s in shapes), *shapes[0][1:]), joined=parts[1:])
    return moves


def _told_by_networks(
    source: Weights, told: Told, own: Mapping[str, NamedTensor], place: Mapping[str, NamedTensor]
) -> dict[str, Move]:
    """What the user's map splits and joins; the result network says how many rows go where."""

    def placed(name: str) -> NamedTensor:
        if name not in place:
            raise PlanError(f"name_map names {name!r}, which the result network lacks{check.near(name, list(place))}.")
        return place[name]

    def held(name: str) -> NamedTensor:
        kind = own[name].kind if name in own else "linear"
        return NamedTensor(name, "", "", kind, source.entries[name].shape)

    moves: dict[str, Move] = {}
    splits = [(Fusion(held(name), tuple(map(placed, wanted))), True) for name, wanted in told.splits.items()]
    joins = [(Fusion(placed(new), tuple(map(held, parts))), False) for new, parts in told.joins.items()]
    for fusion, splitting in splits + joins:
        if not fusion.fits():
            parts = {part.name: list(part.shape) for part in fusion.parts}
            raise PlanError(f"{fusion.fused.name!r} of shape {list(fusion.fused.shape)} is not the rows of {parts}.")
        moves |= _fusion_moves(fusion, splitting, lambda slot: slot.name)
    return moves


def _fusion_moves(fusion: Fusion, splitting: bool, origin: Callable[[NamedTensor], str]) -> dict[str, Move]:
    """The moves of a fused tensor's parts, or of the parts to their fused tensor."""
    layout = "transpose" if fusion.transposed else ""
    if not splitting:
        first, *others = map(origin, fusion.parts)
        return {fusion.fused.name: Move(first, fusion.fused.shape, layout, joined=tuple(others))}
    rows = {part.name: part.shape[0] for part in fusion.parts}
    spans = row_spans(fusion.fused.name, sum(rows.values()), rows)
    return {p.name: Move(origin(fusion.fused), p.shape, layout, spans[p.name]) for p in fusion.parts}


def _fused_report(moves: Mapping[str, Move]) -> dict[str, Any]:
    split: dict[str, list[str]] = {}
    for name, move in moves.items():
        if move.rows is not None:
            split.setdefault(str(move.source), []).append(name)
    return {"split": split, "joined": {n: list(m.sources) for n, m in moves.items() if m.joined}}


def _by_networks(
    source: Weights,
    sources: list[NamedTensor],
    results: list[NamedTensor],
    names: Sequence[str],
    renamed: Mapping[str, str],
    told: Told,
    *,
    strict: bool,
) -> Job:
    # A file name under the user's map may already be a name of the result; then it needs no matching.
    own = {s.name: s for s in sources}
    place = {r.name: r for r in results}
    moves = _told_by_networks(source, told, own, place)
    direct = {renamed[n]: n for n in names if renamed[n] != n and renamed[n] in place}
    unknown = [n for n in names if renamed[n] != n and renamed[n] not in place and renamed[n] not in own]
    if unknown:
        raise PlanError(f"name_map turns {unknown[0]!r} into {renamed[unknown[0]]!r}, which neither network has.")
    known = {renamed[n]: n for n in names if renamed[n] not in direct}
    in_file = loading.match_names(list(own), list(known), suffixes=True)
    # A file may hold a shared tensor once: its other names are then fed from there.
    held_by = {s.same: in_file[s.name] for s in reversed(sources) if s.name in in_file}
    in_file |= {s.name: held_by[s.same] for s in sources if s.same in held_by and s.name not in in_file}
    held = [s for s in sources if s.name in in_file]

    def origin(slot: NamedTensor) -> str:
        name = known[in_file[slot.name]]
        if source.entries[name].shape != slot.shape:
            raise PlanError(
                f"{name!r} has shape {list(source.entries[name].shape)} in the file, {list(slot.shape)} in the source "
                "network."
            )
        return name

    open_results = [r for r in results if r.name not in direct and r.name not in moves]
    splits, joins = find_fusions(held, open_results), find_fusions(open_results, held)
    for fusion in splits + joins:
        moves |= _fusion_moves(fusion, fusion in splits, origin)
    fused = {slot.same for fusion in splits + joins for slot in (fusion.fused, *fusion.parts)}
    found, by_order = match_slots(
        [s for s in held if s.same not in fused], [r for r in open_results if r.name not in moves]
    )
    for result in results:
        if result.name in direct:
            moves[result.name] = _direct(source, direct[result.name], own, result)
        elif result.name in found:
            slot = own[found[result.name]]
            moves[result.name] = Move(origin(slot), result.shape, layout_of(slot, result))
    for result in results:
        twin = next((r.name for r in results if r.same == result.same and r.name in moves), None)
        if result.name not in moves and twin is not None:
            moves[result.name] = moves[twin]
    used = {name for move in moves.values() for name in move.sources}
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
            "renamed": {m.source: n for n, m in moves.items() if m.sources == (m.source,) != (n,) and not m.rows},
            "relaid": [n for n, m in moves.items() if m.layout],
            "dropped": dropped,
            "initialised": zeros,
            "tied": tied,
            "by_order": by_order,
            "unused": unused,
            "missing": missing,
            **_fused_report(moves),
        },
        {
            **{s.name: known[in_file[s.name]] for s in held},
            **{n: n for n in (*direct.values(), *told_names(told)) if n in own},
        },
    )


def _direct(source: Weights, origin: str, by_name: Mapping[str, NamedTensor], result: NamedTensor) -> Move:
    """A tensor that the user's map sends to its place: the layer's kind still decides the layout."""
    shape = source.entries[origin].shape
    kind = by_name[origin].kind if origin in by_name else result.kind
    return Move(origin, result.shape, layout_of(NamedTensor(origin, "", "", kind, shape), result))
