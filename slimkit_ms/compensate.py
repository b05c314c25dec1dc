"""Repair of a pruned MindSpore cell from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimkit.core.log import progress
from slimkit.core.prune.plan import Plan
from slimkit.core.prune.refit import Moments, refit
from slimkit_ms import bridge
from slimkit_ms.replay import replaying

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]
MAX_INPUTS = 6000  # second moments of more inputs than this do not fit beside a model


def compensate(
    dense: nn.Cell, pruned: nn.Cell, plan: Plan, layers: Sequence[str], data: Iterable[Any], damping: float
) -> dict[str, Any]:
    """Refit every ordinary convolution and dense layer of a pruned cell to its original's outputs, in place.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.refit`.

    Returns:
        {"refitted": layer -> rows of calibration data it saw, "left": layers that were left alone -> why}.
    """
    report: dict[str, Any] = {"refitted": {}, "left": {}}
    for path in progress(layers, "layers"):
        new = bridge.get_module(pruned, path)
        why = _unsuited(new)
        if why:
            report["left"][path] = why
            continue
        rows = plan.indices.get(f"{path}.weight", [None])[0]
        weight, bias = bridge.as_numpy(new.weight), new.bias if new.has_bias else None
        start = weight.reshape(len(weight), -1).astype(np.float64)
        moments = Moments(start.shape[1], start.shape[0], bias is not None)
        for batch in data:
            for (_, wanted), (given, _) in zip(_seen(dense, path, batch), _seen(pruned, path, batch)):
                y = np.moveaxis(wanted, 1, -1) if isinstance(new, nn.Conv2d) else wanted
                y = y.reshape(-1, y.shape[-1])
                moments.add(layer_rows(new, given), y if rows is None else y[:, rows])
        first = None if bias is None else bridge.as_numpy(bias).astype(np.float64)
        fitted, shift = refit(moments, start, first, damping)
        new.weight.set_data(ms.Tensor(fitted.reshape(weight.shape).astype(weight.dtype)))
        if bias is not None and shift is not None:
            bias.set_data(ms.Tensor(shift.astype(weight.dtype)))
        report["refitted"][path] = moments.number
    settle_norms(pruned, data)
    return report


def _unsuited(cell: nn.Cell) -> str | None:
    if isinstance(cell, nn.Conv2d):
        if cell.group != 1:
            return "grouped or transposed"
    elif not isinstance(cell, nn.Dense):
        return "not a plain Conv2d or Dense"
    elif cell.activation_flag:
        return "an activation of its own hides its outputs"
    return f"more than {MAX_INPUTS} inputs" if cell.weight[0].size > MAX_INPUTS else None


def _seen(model: nn.Cell, path: str, batch: Any) -> list[tuple[Array, Array]]:
    """Input and output of one layer at each of its calls."""
    calls: list[tuple[Array, Array]] = []

    def seen(_name: str, inputs: Any, output: Any) -> None:
        calls.append((bridge.as_numpy(inputs[0]), bridge.as_numpy(output)))

    with replaying(model) as run, bridge.hooked({path: bridge.get_module(model, path)}, seen):
        run(batch)
    return calls


def layer_rows(cell: nn.Cell, x: Array) -> Array:
    """What the layer multiplies with its weights: one row for each output position, (n, inputs)."""
    if not isinstance(cell, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    spans = [(k - 1) * d + 1 for k, d in zip(cell.kernel_size, _pair(cell.dilation))]
    strides = _pair(cell.stride)
    x = np.pad(x, [(0, 0), (0, 0), *_padding(cell, x.shape[2:], spans, strides)])
    windows: Array = np.lib.stride_tricks.sliding_window_view(x, tuple(spans), axis=(2, 3))  # type: ignore[call-overload]
    windows = windows[:, :, :: strides[0], :: strides[1], :: _pair(cell.dilation)[0], :: _pair(cell.dilation)[1]]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, cell.weight[0].size)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value[-2:])


def _padding(
    cell: nn.Cell, space: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    if cell.pad_mode == "valid":
        return [(0, 0), (0, 0)]
    if cell.pad_mode == "pad":
        given = (cell.padding,) * 4 if isinstance(cell.padding, int) else cell.padding
        return [(given[0], given[1]), (given[2], given[3])]
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(space, spans, strides)]
    return [(n // 2, n - n // 2) for n in totals]


def settle_norms(model: nn.Cell, data: Iterable[Any]) -> None:
    """Measure batch norm's running statistics anew, in place; a cut layer's inputs are not what they were."""
    for path, cell in model.cells_and_names():
        if "moving_mean" not in cell._params:
            continue
        means, variances = [], []
        for batch in data:
            for x, _ in _seen(model, path, batch):
                axes = tuple(axis for axis in range(x.ndim) if axis != 1)
                count = x.size // x.shape[1]
                means.append(x.mean(axes, dtype=np.float64))
                variances.append(x.var(axes, dtype=np.float64) * count / max(count - 1, 1))
        if means:
            cell.moving_mean.set_data(ms.Tensor(np.mean(means, axis=0).astype(np.float32)))
            cell.moving_variance.set_data(ms.Tensor(np.mean(variances, axis=0).astype(np.float32)))
