"""What a MindSpore cell weighs: parameters, zeros, multiply-accumulates and latency, layer by layer."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from slimkit.core.jobs.measurement import LayerMeasurement, Measurement, fastest_ms
from slimkit_ms import bridge, kinds

import mindspore as ms
from mindspore import nn


def measure_model(
    model: nn.Cell, inputs: Any, latency_budget_s: float = 0.5, dense: nn.Cell | None = None
) -> Measurement:
    """Measure a cell on one example input; the cell is left as it was.

    Args:
        model: any cell.
        inputs: what `model(*inputs)` takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        latency_budget_s: seconds to spend on timing forwards; 0 does not time them: NaN.
        dense: a cell whose forwards are timed in turn with this one's.

    Returns:
        The figures of the whole model and of each layer that holds a weight of two or more axes.

    Example:
        >>> measure_model(nn.Dense(4, 3), ms.ops.ones((2, 4)), 0.01).macs
        24
    """
    layers = {path: cell for path, cell in model.cells_and_names() if _weights(cell)}
    macs: dict[str, int] = {}

    def seen(path: str, args: Any, output: Any) -> None:
        # A layer called twice works twice.
        macs[path] = macs.get(path, 0) + _macs(layers[path], args, output)

    with bridge.evaluating(model), bridge.pynative():
        with bridge.hooked(layers, seen):
            bridge.run(model, inputs)
        with contextlib.nullcontext() if dense is None else bridge.evaluating(dense):
            cells = [model] if dense is None else [model, dense]
            times = fastest_ms([functools.partial(_forward, cell, inputs) for cell in cells], latency_budget_s)
    zeros = {id(w): int((w.asnumpy() == 0).sum()) for cell in layers.values() for w in _weights(cell)}
    rows = [
        LayerMeasurement(
            name=path,
            kind=type(cell).__name__,
            shape=tuple(_weights(cell)[0].shape),
            width=_width(cell),
            parameters=sum(p.size for key, p in _own(cell).items() if key not in kinds.STATISTICS),
            zeros=sum(zeros[id(w)] for w in _weights(cell)),
            macs=macs.get(path),
        )
        for path, cell in layers.items()
    ]
    parameters = [
        (p.size, p.nbytes, p.requires_grad)
        for p, paths in bridge.parameter_paths(model)
        if bridge.is_weight(p, paths[0])
    ]
    return Measurement.of(rows, parameters, sum(zeros.values()), *times)


def _own(cell: nn.Cell) -> dict[str, ms.Parameter]:
    return {key: p for key, p in cell._params.items() if p is not None}


def _weights(cell: nn.Cell) -> list[ms.Parameter]:
    """The cell's own parameters that are matrices or kernels, the weight first."""
    own = {key: p for key, p in _own(cell).items() if p.ndim >= 2}
    return [own[key] for key in sorted(own, key=lambda key: key not in ("weight", "embedding_table"))]


def _width(cell: nn.Cell) -> int:
    """Output channels or features."""
    return kinds.width_of(cell) if kinds.makes_width(cell) else int(_weights(cell)[0].shape[0])


def _macs(cell: nn.Cell, args: Any, output: Any) -> int:
    """Each entry of a weight is used once at every position: pixel, token or sample."""
    if kinds.is_kind(cell, "embedding") or not isinstance(output, ms.Tensor):
        return 0
    if kinds.is_transposed(cell):
        positions = args[0].size // int(kinds.weight_of(cell).shape[0])
    else:
        positions = output.size // max(_width(cell), 1)
    return positions * sum(w.size for w in _weights(cell))


def _forward(cell: nn.Cell, inputs: Any) -> None:
    _wait(bridge.run(cell, inputs))


def _wait(output: Any) -> None:
    """Return when the output has been computed."""
    if isinstance(output, ms.Tensor):
        output.asnumpy()
    elif isinstance(output, (tuple, list)):
        for value in output:
            _wait(value)
