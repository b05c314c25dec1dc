"""Matrices that one network holds as one and the other as several: query-key-value, and gate-up of a gated FFN."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.core import check
from slimkit.core.convert.slots import NamedTensor
from slimkit.core.errors import PatternError, PlanError
from slimkit.core.match import bounded_regex
from slimkit.core.weights.projections import attention_role

# The order in which a fused matrix holds its parts.
_PARTS = (("query", "key", "value"), ("gate", "up"))
_FFN = {
    "gate_up_proj": "fused gate",
    "gate_up": "fused gate",
    "gate_proj": "gate",
    "gate": "gate",
    "w1": "gate",
    "up_proj": "up",
    "up": "up",
    "w3": "up",
}


@dataclass(frozen=True)
class Fusion:
    """One tensor on one side that is several on the other; its rows are theirs, one part after the other.

    Args:
        fused: the tensor that holds all.
        parts: those that hold one each, in the order of the rows.
    """

    fused: NamedTensor
    parts: tuple[NamedTensor, ...]

    @property
    def transposed(self) -> bool:
        """The fused tensor is stored (in, out), as Hugging Face's Conv1D does."""
        return self.fused.kind == "linear_t" and len(self.fused.shape) == 2

    def fits(self) -> bool:
        """Whether the parts, (out, in) each, add up."""
        shape = self.fused.shape[::-1] if self.transposed else self.fused.shape
        rows = sum(p.shape[0] for p in self.parts if p.shape)
        plain = all(p.kind != "linear_t" or len(p.shape) < 2 for p in self.parts)
        return plain and rows == shape[0] and all(p.shape[1:] == shape[1:] for p in self.parts)


def find_fusions(fused: Sequence[NamedTensor], separate: Sequence[NamedTensor]) -> list[Fusion]:
    """Layers that one network holds as one matrix and the other as several, paired in order.

    Args:
        fused: slots of the one network.
        separate: slots of the other.

    Returns:
        One fusion for every weight and bias; none where the numbers of layers differ or a shape does not add up, which
        leaves the layers to be reported as without a place.
    """
    found: list[Fusion] = []
    for roles in _PARTS:
        whole = list(_fused_layers(fused, roles).values())
        apart = list(_separate_layers(separate, roles).values())
        made = [
            Fusion(layer[key], tuple(parts[role, key] for role in roles))
            for layer, parts in zip(whole, apart)
            for key in layer
            if all((role, key) in parts for role in roles)
        ]
        held = sum(map(len, whole)) * len(roles) == sum(map(len, apart)) == len(made) * len(roles)
        if len(whole) == len(apart) and held and all(fusion.fits() for fusion in made):
            found += made
    return found


def _role(word: str) -> str | None:
    return attention_role(word) or _FFN.get(word.lower())


def _fused_layers(slots: Iterable[NamedTensor], roles: tuple[str, ...]) -> dict[str, dict[str, NamedTensor]]:
    """Path of a fused layer -> its weight and bias."""
    wanted = "fused" if "query" in roles else "fused gate"
    layers: dict[str, dict[str, NamedTensor]] = {}
    for slot in slots:
        own = slot.role.removeprefix("in_proj_")
        word = "in_proj" if own != slot.role else slot.path.rpartition(".")[2]
        if _role(word) == wanted and own in ("weight", "bias"):
            layers.setdefault(slot.path, {})[own] = slot
    return {path: layer for path, layer in layers.items() if "weight" in layer}


def _separate_layers(
    slots: Iterable[NamedTensor], roles: tuple[str, ...]
) -> dict[str, dict[tuple[str, str], NamedTensor]]:
    """Path of the module around the parts -> (role, weight or bias) -> slot."""
    layers: dict[str, dict[tuple[str, str], NamedTensor]] = {}
    for slot in slots:
        parent, _, word = slot.path.rpartition(".")
        role = _role(word)
        if role in roles and slot.role in ("weight", "bias"):
            layers.setdefault(parent, {})[str(role), slot.role] = slot
    return {path: layer for path, layer in layers.items() if all((role, "weight") in layer for role in roles)}


# --- said by the user ---


@dataclass(frozen=True)
class Told:
    """Entries of a name map that split one tensor or join several."""

    splits: dict[str, dict[str, int | None]]  # name in the source -> name in the result -> rows, None: equal shares
    joins: dict[str, tuple[str, ...]]  # name in the result -> names in the source, in the order of the rows


def told_fusions(names: Sequence[str], name_map: Mapping[Any, Any] | None) -> tuple[dict[str, str], Told]:
    """The plain entries of a name map, and those that split or join.

    Args:
        names: names in the source.
        name_map: name -> name; name -> list of names, or dict of names to rows (a split); tuple of names -> name (a
            join). Every name may be "re:" and a pattern.

    Raises:
        PatternError: an entry that matches nothing, or not all parts of a tensor.

    Example:
        >>> told_fusions(["a.qkv", "b.q", "b.k"], {"a.qkv": ["a.q", "a.k"], ("b.q", "b.k"): "b.qk"})[1].joins
        {'b.qk': ('b.q', 'b.k')}
    """
    plain: dict[str, str] = {}
    told = Told({}, {})
    if name_map is not None:
        check.instance(name_map, Mapping, "name_map", "a dict from names to names")
    for old, new in (name_map or {}).items():
        if isinstance(old, tuple):
            _join(names, old, check.text(new, "a value of name_map"), told)
        elif isinstance(new, (list, tuple, Mapping)):
            rows = new if isinstance(new, Mapping) else {}
            for count in rows.values():
                check.positive(count, "rows in name_map")
            parts = check.strings(list(new), "a value of name_map")
            hits = [_renamed(names, old, part) for part in parts]
            for name in hits[0]:
                told.splits[name] = {hit[name]: rows.get(part) for part, hit in zip(parts, hits, strict=True)}
        else:
            plain[old] = new
    return plain, told


def told_names(told: Told) -> set[str]:
    """The tensors of the source that a map splits or joins."""
    return {*told.splits, *(name for parts in told.joins.values() for name in parts)}


def _join(names: Sequence[str], parts: tuple[Any, ...], new: str, told: Told) -> None:
    hits = [{v: k for k, v in _renamed(names, part, new).items()} for part in parts]
    for result in hits[0]:
        if not all(result in hit for hit in hits):
            raise PatternError(f"name_map: {result!r} is to be joined of {len(parts)} tensors, and one is not there.")
        told.joins[result] = tuple(hit[result] for hit in hits)


def _renamed(names: Sequence[str], old: Any, new: str) -> dict[str, str]:
    """name -> new name for all names that a key of the map, whole or a pattern, means."""
    text = check.text(old, "a key of name_map")
    if text.startswith("re:"):
        expression = bounded_regex(text[3:], "name_map")
        try:
            found = {n: expression.sub(new, n) for n in names if expression.search(n)}
        except (re.error, IndexError) as error:
            raise PatternError(f"name_map: {new!r} is no replacement for {text!r}: {error}") from None
    else:
        found = {n: new for n in names if n == text}
    if not found:
        raise PatternError(f"name_map must name tensors of the source. Received: {text!r}{check.near(text, names)}")
    return found


def row_spans(name: str, rows: int, wanted: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
    """Where each part of a split begins and ends.

    Raises:
        PlanError: the parts do not add up to the tensor.

    Example:
        >>> row_spans("qkv", 8, {"q": 4, "k": 2, "v": 2})
        {'q': (0, 4), 'k': (4, 6), 'v': (6, 8)}
    """
    sizes = {n: rows // len(wanted) if r is None else r for n, r in wanted.items()}
    if sum(sizes.values()) != rows:
        raise PlanError(
            f"{name!r} has {rows} rows, which {len(sizes)} parts of {list(sizes.values())} rows are not. Say how many "
            'rows each gets: name_map={"name": {"first part": rows, ...}}.'
        )
    spans, at = {}, 0
    for part, size in sizes.items():
        spans[part] = (at, at + size)
        at += size
    return spans
