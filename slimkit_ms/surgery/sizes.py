"""The numbers a cell's own code builds shapes from: found by what they were, set to what they must become."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimkit_ms import bridge
from slimkit_ms.surgery.layers import Undo
from slimkit_ms.trace import Mark

from mindspore import nn

Shape = tuple[int, ...]
Predict = Callable[[int], Shape]

_WIDTHS = re.compile(
    r"head|hidden|embed|dim|channel|feature|width|inner|planes|size|model|units|ff|nf?$", re.IGNORECASE
)
_NOT_WIDTHS = re.compile(
    r"kernel|strid|pad|patch|window|vocab|image|img|max|length|layer|depth|dilat|step|level|num_class|axis|scale",
    re.IGNORECASE,
)
# Names of what a cell is given, rather than of what it makes inside.
_GIVEN = re.compile(r"hidden|embed|model|^dim$|^width$", re.IGNORECASE)


@dataclass(frozen=True)
class Slot:
    """One number that a cell keeps and its code may build shapes from.

    Args:
        name: the attribute.
        place: position inside a tuple or list; None for a plain int.
    """

    name: str
    place: int | None = None

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
    """

    options: dict[str, dict[Slot, list[int]]]
    kinds: dict[str, type]

    def orders(self, kind: type) -> Iterator[dict[Slot, int]]:
        """The choices for one class, likeliest first: for each slot the place in its list of values."""
        slots: dict[Slot, int] = {}
        for path, options in self.options.items():
            if self.kinds[path] is kind:
                for slot, values in options.items():
                    slots[slot] = max(slots.get(slot, 0), len(values))
        # Few slots are wrong at a time, so that choices near the likeliest come first.
        every = itertools.product(*(range(n) for n in slots.values()))
        for order in sorted(every, key=lambda o: (sum(map(bool, o)), sum(o))):
            yield dict(zip(slots, order, strict=True))

    def write(self, model: nn.Cell, orders: Mapping[type, Mapping[Slot, int]], undo: Undo) -> None:
        """Set every slot to its chosen value, in place."""
        cells = dict(model.cells_and_names())
        for path, options in self.options.items():
            order = orders.get(self.kinds[path], {})
            for slot, values in options.items():
                _set(cells[path], slot, values[min(order.get(slot, 0), len(values) - 1)], undo)


def find_sizes(model: nn.Cell, marks: list[Mark], predict: Predict, undo: Undo) -> Sizes:
    """Look through the cells whose code made something that now has another shape.

    Args:
        model: the cell, its parameters already cut.
        marks: the compiled operators before the cut.
        predict: number of a value -> its shape after the cut.
        undo: the cut parameters, old and new.

    Returns:
        The slots and their possible values; slots that cannot change are left out.
    """
    made: dict[str, list[tuple[int, int]]] = defaultdict(list)
    given: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for mark in marks:
        for number, before in zip(mark.values, mark.shapes):
            after = predict(number)
            if len(before) == len(after):
                pairs = list(zip(before, after, strict=True))
                made[mark.scope].extend(pairs)
                parent = mark.scope.rpartition(".")[0]
                given[parent].extend(pairs)
    paths = {id(cell): path for path, cell in model.cells_and_names()}
    for cell, _, before, now in undo.parameters:
        pairs = list(zip(before.shape, now.shape, strict=True))
        made[paths[id(cell)]].extend(pairs)
        given[paths[id(cell)].rpartition(".")[0]].extend(pairs[::-1])
    options: dict[str, dict[Slot, list[int]]] = {}
    kinds: dict[str, type] = {}
    for path, cell in model.cells_and_names():
        if bridge.is_plain_layer(cell) or not (made.get(path) or given.get(path)):
            continue
        found = {}
        for slot, value in _slots(cell).items():
            first, second = (given, made) if _GIVEN.search(slot.name) else (made, given)
            seen = [new for old, new in (*first.get(path, ()), *second.get(path, ())) if old == value and new != value]
            news = list(dict.fromkeys(seen))
            if news:
                found[slot] = [*news, value] if slot.likely else [value, *news]
        if found:
            options[path], kinds[path] = found, type(cell)
    return Sizes(options, kinds)


def _slots(cell: nn.Cell) -> dict[Slot, int]:
    """The numbers above one that a cell keeps as plain attributes."""
    found: dict[Slot, int] = {}
    for name, value in vars(cell).items():
        if name.startswith("_") or _NOT_WIDTHS.search(name):
            continue
        if _is_size(value):
            found[Slot(name)] = value
        elif isinstance(value, (tuple, list)) and len(value) < 9:
            found.update({Slot(name, place): item for place, item in enumerate(value) if _is_size(item)})
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _set(cell: nn.Cell, slot: Slot, value: int, undo: Undo) -> None:
    if slot.place is None:
        undo.set(cell, slot.name, value)
        return
    items = list(vars(cell)[slot.name])
    items[slot.place] = value
    undo.set(cell, slot.name, type(vars(cell)[slot.name])(items))
