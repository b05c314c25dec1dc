"""While deltas are merged they do not train: whoever puts their layers into training mode is told, once."""

from __future__ import annotations

from typing import Any

from slimkit.core.delta.merged import WATCH, MergedWatch
from slimkit_ms import bridge
from slimkit_ms.delta.attach import DeltaLayer

from mindspore import nn

__all__ = ["bridge", "look", "watch"]


def watch(model: nn.Cell) -> None:
    """Watch the merged layers of a model and no other, in place; those that are in training mode are seen at once."""
    one = MergedWatch()
    for _, cell in model.cells_and_names():
        vars(cell).pop(WATCH, None)
        if isinstance(cell, DeltaLayer) and cell.delta_is_merged:
            vars(cell)[WATCH] = one
            look(cell)


def look(cell: Any) -> None:
    """See a layer that may be in training mode now: no hook of MindSpore's runs in a compiled graph."""
    one = vars(cell).get(WATCH)
    if one is not None and cell.training:
        one.see(cell.parameters_and_names())
