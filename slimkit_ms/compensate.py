"""Repair of a pruned MindSpore cell from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import repair
from slimkit_ms import bridge, kinds
from slimkit_ms.replay import replaying

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def compensate(
    dense: nn.Cell, pruned: nn.Cell, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float
) -> dict[str, Any]:
    """Refit every ordinary 2-d convolution and dense layer of a pruned cell to its original's outputs, in place.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.refit`.

    Returns:
        What `slimkit.core.prune.refit.repair` reports.
    """
    return repair(MindSporeRepair(dense, pruned), layers, plan, data, damping)


class MindSporeRepair:
    """A cell before and after its cut, as compensation sees it.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell) -> None:
        self._dense, self._pruned = dense, pruned

    def unsuited(self, path: str) -> str | None:
        cell = bridge.get_module(self._pruned, path)
        kind = kinds.kind_of(cell)
        if kind is not None and kind.word == "conv":
            if kind.transposed or kinds.groups_of(cell) != 1:
                return "grouped or transposed"
            if kind.space != 2 or kinds.padding_mode_of(cell) != "zeros":
                return "not a plain Conv2d"
        elif kind is None or kind.word != "linear":
            return "not a plain Conv2d or Dense"
        return None if kinds.activation_of(cell) is None else "an activation of its own hides its outputs"

    def made_axis(self, path: str) -> int:
        return 0

    def values(self, path: str) -> tuple[Array, Array | None]:
        cell = bridge.get_module(self._pruned, path)
        weight, bias = kinds.weight_of(cell), kinds.bias_of(cell)
        return _numbers(weight).reshape(len(weight), -1), None if bias is None else _numbers(bias)

    def calls(self, path: str, batch: Any) -> Iterator[tuple[Array, Array]]:
        cell = bridge.get_module(self._pruned, path)
        for (_, wanted), (given, _) in zip(_seen(self._dense, path, batch), _seen(self._pruned, path, batch)):
            y = np.moveaxis(wanted, 1, -1) if kinds.is_kind(cell, "conv") else wanted
            yield layer_rows(cell, given), y.reshape(-1, y.shape[-1])

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        cell = bridge.get_module(self._pruned, path)
        _put(kinds.weight_of(cell), weight)
        if bias is not None:
            held = kinds.bias_of(cell)
            assert held is not None
            _put(held, bias)


def _numbers(tensor: ms.Tensor) -> Array:
    # By way of float32: bfloat16 tensors give no array.
    found: Array = tensor.astype(ms.float32).asnumpy().astype(np.float64)
    return found


def _put(parameter: ms.Parameter, values: Array) -> None:
    whole = np.ascontiguousarray(values.reshape(parameter.shape), dtype=np.float32)
    parameter.set_data(ms.Tensor(whole).astype(parameter.dtype))


def _seen(model: nn.Cell, path: str, batch: Any) -> list[tuple[Array, Array]]:
    """Input and output of one layer at each of its calls."""
    calls: list[tuple[Array, Array]] = []

    def seen(_name: str, inputs: Any, output: Any) -> None:
        calls.append((_numbers(inputs[0]), _numbers(output)))

    with replaying(model) as run, bridge.hooked({path: bridge.get_module(model, path)}, seen):
        run(batch)
    return calls


def layer_rows(cell: nn.Cell, x: Array) -> Array:
    """What the layer multiplies with its weights: one row for each output position, (n, inputs)."""
    if not kinds.is_kind(cell, "conv"):
        return x.reshape(-1, x.shape[-1])
    strides, dilations = kinds.steps_of(cell, "stride"), kinds.steps_of(cell, "dilation")
    spans = tuple((k - 1) * d + 1 for k, d in zip(cell.kernel_size, dilations))
    x = np.pad(x, [(0, 0), (0, 0), *kinds.pads_of(cell, x.shape[2:])])
    # (batch, channels, height, width, *window), thinned by stride and dilation
    windows: Array = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))  # type: ignore[call-overload]
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, cell.weight[0].size)
