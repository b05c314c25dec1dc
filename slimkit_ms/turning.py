"""A MindSpore cell on other axes: parameters get other values of their shape, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def by_path(model: nn.Cell) -> dict[str, ms.Parameter]:
    """Every parameter under every path that it stands under."""
    return {path: parameter for parameter, paths in bridge.parameter_paths(model) for path in paths}


def turn(model: nn.Cell, values: Iterable[tuple[str, Array]], parted: Mapping[str, str]) -> Callable[[], None]:
    """Give parameters other values of their shape, in place; on an error the cell is as it was.

    Args:
        model: the cell.
        values: path and values; all are computed from the cell before the first is written.
        parted: parameters that share their tensor with another one, and get one of their own: path -> the other.

    Returns:
        A call that takes it back.
    """
    shared: list[tuple[dict[str, Any], str, ms.Parameter]] = []
    before: list[tuple[ms.Parameter, ms.Tensor]] = []

    def undo() -> None:
        for parameter, held in reversed(before):
            parameter.set_data(held)
        for owner, name, parameter in reversed(shared):
            owner[name] = parameter
        if shared:
            bridge.forget_graphs(model)
        before.clear()
        shared.clear()

    made = list(values)
    try:
        known = by_path(model)
        for path, table in parted.items():
            if path not in known or known[path] is not known.get(table):
                continue  # apart already
            module, _, name = path.rpartition(".")
            owner, parameter = bridge.get_module(model, module)._params, known[path]
            shared.append((owner, name, parameter))
            owner[name] = ms.Parameter(parameter.value().copy(), name=path, requires_grad=parameter.requires_grad)
        if shared:
            bridge.forget_graphs(model)
            known = by_path(model)
        for path, value in made:
            parameter = known[path]
            before.append((parameter, parameter.value().copy()))
            # By way of float32: no kernel here takes float64 to bfloat16.
            whole = ms.Tensor(np.ascontiguousarray(value, dtype=np.float32))
            parameter.set_data(whole.astype(parameter.dtype))
    except BaseException:
        undo()
        raise
    return undo
