"""Positions that start behind a prefix: cells that get position numbers get them increased by its length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from slimkit.core.delta import positions as rules
from slimkit.core.delta.prefix import refuse_replaced
from slimkit.core.errors import UnsupportedError
from slimkit.core.source.generated import method_from
from slimkit_ms import bridge
from slimkit_ms.delta.layer import DeltaLayer

import mindspore as ms
from mindspore import nn

__all__ = ["bridge", "shift_positions", "shifted_classes", "start_at_zero", "start_behind"]


class _Shifted(nn.Cell):
    """A cell whose whole-number inputs are positions: the same object under a subclass of its own class."""

    prefix_shift: int
    prefix_acts: bool

    def is_position(self, given: Any) -> bool:
        """Whether an input holds whole numbers; a mask does not."""
        if not isinstance(given, ms.Tensor):
            return False
        return given.dtype == ms.int32 or given.dtype == ms.int64

    def shifted(self, given: Any) -> Any:
        """Positions that begin behind the prefix; anything else as it is."""
        if self.prefix_acts and self.is_position(given):
            return given + self.prefix_shift
        return given


def shifted_classes(model: nn.Cell, paths: Sequence[str]) -> dict[str, type]:
    """The class that each of these cells changes to; UnsupportedError where one cannot.

    Nothing is changed: making the classes is what can fail, so it comes before anything is put on.
    """
    made = {}
    for path in paths:
        cell = bridge.get_module(model, path)
        if isinstance(cell, (DeltaLayer, _Shifted)):
            raise UnsupportedError(f"positions cannot be shifted in {path}: it carries a delta already.")
        refuse_replaced([path] if "construct" in vars(cell) else [], "construct")
        construct = inspect.unwrap(type(cell).construct)
        parameters = list(inspect.signature(construct).parameters.values())
        source = rules.shifted_source(parameters, type(cell).__name__)
        methods = {
            "construct": method_from(source, type(cell).__name__, construct),
            "construct_unshifted": type(cell).construct,
        }
        made[path] = type(f"Shifted{type(cell).__name__}", (_Shifted, type(cell)), methods)
    return made


def start_behind(model: nn.Cell, tokens: int, classes: dict[str, type]) -> None:
    """Let the cells of `shifted_classes` count from `tokens`, in place."""
    for path, kind in classes.items():
        cell: Any = bridge.get_module(model, path)
        cell.prefix_shift, cell.prefix_acts = tokens, True
        cell.__class__ = kind


def shift_positions(model: nn.Cell, acts: bool) -> None:
    """Let positions start behind the prefix that `start_behind` noted, or at zero while it does not act, in place."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, _Shifted):
            cell.prefix_acts = acts


def start_at_zero(model: nn.Cell) -> None:
    """Let positions start at zero again, in place."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, _Shifted):
            del cell.__dict__["prefix_shift"], cell.__dict__["prefix_acts"]
            cell.__class__ = type(cell).__bases__[-1]
