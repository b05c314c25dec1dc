"""The numbers a cell's own code builds shapes from: found by what they were, set to what they must become."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimkit.core.prune.cut_shapes import CutShapes
from slimkit_ms import bridge
from slimkit_ms.surgery.layers import Undo
from slimkit_ms.trace import Traced

from mindspore import nn

# path of a cell -> attribute ("name", or "name.2" for an item of a tuple) -> (before, after)
Attributes = dict[str, dict[str, tuple[int, int]]]

_WIDTHS = re.compile(
    r"head|hidden|embed|dim|channel|feature|width|inner|planes|size|model|units|ff|nf?$", re.IGNORECASE
)
_NOT_WIDTHS = re.compile(
    # The size of a head never changes: its scale depends on it.
    r"(?<!all_)(?<!total_)head_?(dim|size)$|dim_head|size_per_head|"
    r"kernel|strid|pad|patch|window|vocab|image|img|max|length|layer|depth|dilat|step|level|num_class|axis|scale",
    re.IGNORECASE,
)
_HEADS = re.compile(r"heads?$|^n_head|nheads", re.IGNORECASE)
# Names of what a cell is given, rather than of what it makes inside.
_GIVEN = re.compile(r"hidden|embed|model|^dim$|^width$", re.IGNORECASE)


@dataclass(frozen=True)
class SizeAttribute:
    """One number that a cell keeps and its code may build shapes from.

    Args:
        name: the attribute.
        place: position inside a tuple or list; None for a plain int.
    """

    name: str
    place: int | None = None

    def __str__(self) -> str:
        return self.name if self.place is None else f"{self.name}.{self.place}"

    @property
    def likely(self) -> bool:
        """Whether the name says that it is a width or a count of heads."""
        return bool(_WIDTHS.search(self.name))


@dataclass
class Sizes:
    """The slots of every cell that computes with its own sizes, and what each may become.

    Args:
        options: path of a cell -> slot -> values to try, the likeliest first.
        kinds: path -> class of the cell.
        before: path -> slot -> the value before the cut.
    """

    options: dict[str, dict[SizeAttribute, list[int]]]
    kinds: dict[str, type]
    before: dict[str, dict[SizeAttribute, int]]

    def orders(self, kind: type) -> Iterator[dict[SizeAttribute, int]]:
        """The choices for one class, likeliest first: for each slot the place in its list of values."""
        slots: dict[SizeAttribute, int] = {}
        for path, options in self.options.items():
            if self.kinds[path] is kind:
                for slot, values in options.items():
                    slots[slot] = max(slots.get(slot, 0), len(values))
        # Few slots are wrong at a time, so that choices near the likeliest come first.
        every = itertools.product(*(range(n) for n in slots.values()))
        for order in sorted(every, key=lambda o: (sum(map(bool, o)), sum(o))):
            yield dict(zip(slots, order, strict=True))

    def write(self, model: nn.Cell, orders: Mapping[type, Mapping[SizeAttribute, int]], undo: Undo) -> None:
        """Set every slot to its chosen value, in place."""
        cells = dict(model.cells_and_names())
        for path, options in self.options.items():
            order = orders.get(self.kinds[path], {})
            for slot, values in options.items():
                _set(cells[path], slot, values[min(order.get(slot, 0), len(values) - 1)], undo)

    def written(self, model: nn.Cell) -> Attributes:
        """What the slots say now, where that differs from before."""
        cells = dict(model.cells_and_names())
        changes: Attributes = {}
        for path, slots in self.before.items():
            now = _slots(cells[path], minimum=1)
            for slot, old in slots.items():
                if now[slot] != old:
                    changes.setdefault(path, {})[str(slot)] = (old, now[slot])
        return changes


def find_sizes(model: nn.Cell, traced: Traced, planned: CutShapes, undo: Undo) -> Sizes:
    """Look through the cells for numbers that may speak of a size that has changed.

    Args:
        model: the cell, its parameters already cut.
        traced: its trace before the cut.
        planned: the shapes of all traced values after the cut.
        undo: the cut parameters, old and new.

    Returns:
        The slots and their possible values; slots that cannot change are left out.
    """
    seen = _evidence(model, traced, planned, undo)
    everywhere = Counter(pair for here in seen.values() for pair in here.own)
    options: dict[str, dict[SizeAttribute, list[int]]] = {}
    kinds: dict[str, type] = {}
    before: dict[str, dict[SizeAttribute, int]] = {}
    for path, cell in model.cells_and_names():
        if bridge.is_plain_layer(cell) or isinstance(cell, nn.MultiheadAttention):
            continue
        found = {}
        for slot, value in _slots(cell).items():
            values = _candidates(slot, value, seen[path] if path in seen else _Evidence(), everywhere)
            if values != [value]:
                found[slot] = values
        if found:
            options[path], kinds[path] = found, type(cell)
            before[path] = {slot: _slots(cell)[slot] for slot in found}
    return Sizes(options, kinds, before)


def _candidates(slot: SizeAttribute, value: int, here: _Evidence, everywhere: Counter[tuple[int, int]]) -> list[int]:
    """What one number may become, the likeliest first; the number itself is always among them."""
    order = (here.read, here.own, here.made) if _GIVEN.search(slot.name) else (here.own, here.made, here.read)
    news = [new for pairs in order for old, new in pairs if old == value]
    if _HEADS.search(slot.name):
        # A count of heads is small, and equals many a size that stays.
        news = [new for old, new in here.own if old == value and new != value] + news
    if not news and slot.likely:
        # The compiler merges reshapes into their neighbours, so that a cell may seem to make nothing itself.
        news = [new for (old, new), _ in everywhere.most_common() if old == value][:3]
    return list(dict.fromkeys([*news, value] if slot.likely else [value, *news]))


@dataclass
class _Evidence:
    """Sizes before and after the cut, seen in one cell.

    Args:
        own: in what its own code made.
        made: in what the layers inside it make.
        read: in what the layers inside it read.
    """

    own: list[tuple[int, int]] = field(default_factory=list)
    made: list[tuple[int, int]] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)


def _evidence(model: nn.Cell, traced: Traced, planned: CutShapes, undo: Undo) -> dict[str, _Evidence]:
    seen: dict[str, _Evidence] = defaultdict(_Evidence)
    for mark in traced.marks:
        for number, before in zip(mark.values, mark.shapes):
            pairs = [(old, new) for old, new in zip(before, planned.shape(number)) if new is not None]
            seen[mark.scope].own.extend(pairs)
    uncut = {id(now): old for _, _, old, now in undo.parameters}
    for path, cell in model.cells_and_names():
        parent = seen[path.rpartition(".")[0]]
        for now in cell._params.values():
            if now is not None:
                # Parameters that were not cut count too: they show which numbers stay.
                pairs = list(zip(uncut.get(id(now), now).shape, now.shape, strict=True))
                seen[path].own.extend(pairs)
                parent.made.extend(pairs[:1])
                parent.read.extend(pairs[1:2])
    return seen


def write_attributes(model: nn.Cell, attributes: Attributes, undo: Undo) -> None:
    """Set the sizes that a plan names, in place; one that says something else in this model is left alone."""
    for path, cell in model.cells_and_names():
        slots = {str(slot): (slot, value) for slot, value in _slots(cell).items()} if path in attributes else {}
        for name, (old, new) in attributes.get(path, {}).items():
            if name in slots and slots[name][1] == old:
                _set(cell, slots[name][0], new, undo)


def _slots(cell: nn.Cell, minimum: int = 2) -> dict[SizeAttribute, int]:
    """The numbers, not less than a minimum, that a cell keeps as plain attributes."""
    found: dict[SizeAttribute, int] = {}
    for name, value in vars(cell).items():
        if name.startswith("_") or _NOT_WIDTHS.search(name):
            continue
        if _is_size(value, minimum):
            found[SizeAttribute(name)] = value
        elif isinstance(value, (tuple, list)) and len(value) < 9:
            found.update(
                {SizeAttribute(name, place): item for place, item in enumerate(value) if _is_size(item, minimum)}
            )
    return found


def _is_size(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _set(cell: nn.Cell, slot: SizeAttribute, value: int, undo: Undo) -> None:
    if slot.place is None:
        undo.set(cell, slot.name, value)
        return
    items = list(vars(cell)[slot.name])
    items[slot.place] = value
    undo.set(cell, slot.name, type(vars(cell)[slot.name])(items))
