"""An example of what a MindSpore cell takes, found where none is given."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from slimkit.core import examples
from slimkit.core.examples import Example, FirstLayer
from slimkit_ms import kinds
from slimkit_ms.trace import Traced, trace_marked

import mindspore as ms
from mindspore import nn


def find_example(model: nn.Cell) -> tuple[Example, Traced]:
    """The first example for which a cell compiles, and its graph.

    Args:
        model: the cell; it is not changed.

    Returns:
        (the example, the graph).

    Raises:
        ArgumentError: none was found; the message lists what was tried.
    """
    dtype = next((p.dtype for p in model.get_parameters() if p.is_floating_point()), ms.float32)

    def tensor(array: np.ndarray[Any, Any]) -> ms.Tensor:
        return ms.Tensor(array, dtype) if array.dtype.kind == "f" else ms.Tensor(array)

    takes = inspect.signature(model.construct).parameters
    return examples.find_example(model, takes, first_layer(model), tensor, [lambda inputs: trace_marked(model, inputs)])


def first_layer(model: nn.Cell) -> FirstLayer | None:
    """The first layer that a cell defines and that says what it takes; None without one."""
    for path, cell in model.cells_and_names():
        kind = kinds.kind_of(cell)
        if kind is None or kind.word == "norm":
            continue
        if kind.word == "recurrent":
            return FirstLayer(path, "recurrent", int(cell.w_ih_list[0].shape[1]))
        shape = kinds.weight_of(cell).shape
        if kind.word == "conv":
            width = shape[0] if kind.transposed else shape[1] * kinds.groups_of(cell)
            return FirstLayer(path, "conv", int(width), kind.space)
        return FirstLayer(path, kind.word, int(shape[0] if kind.word == "embedding" else shape[1]))
    return None
