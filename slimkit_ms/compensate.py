"""Repair of a pruned MindSpore cell from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import RepairStage, repair
from slimkit_ms import bridge, kinds
from slimkit_ms.replay import replaying
from slimkit_ms.signals import input_rows, output_rows, padding_of, real_rows, unsuited

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def compensate(
    dense: nn.Cell, pruned: nn.Cell, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float | None
) -> dict[str, Any]:
    """Refit every ordinary 2-d convolution and dense layer of a pruned cell to its original's outputs, in place.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.repair`.

    Returns:
        What `slimkit.core.prune.refit.repair` reports.
    """
    return repair(MindSporeRepair(dense, pruned, data), layers, plan, damping)


class MindSporeRepair:
    """A cell before and after its cut, as compensation sees it.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell, data: Iterable[Any]) -> None:
        self._dense, self._pruned, self._data = dense, pruned, data
        self._tied = {p: paths for _, paths in bridge.parameter_paths(pruned) if len(paths) > 1 for p in paths}

    def unsuited(self, path: str) -> str | None:
        if f"{path}.weight" in self._tied:
            # Fitted as a layer it would change what it is elsewhere.
            return f"its weight is {next(p for p in self._tied[f'{path}.weight'] if p != f'{path}.weight')} too"
        return unsuited(bridge.get_module(self._pruned, path))

    def made_axis(self, path: str) -> int:
        return 0

    def values(self, path: str) -> tuple[Array, Array | None]:
        cell = bridge.get_module(self._pruned, path)
        weight, bias = kinds.weight_of(cell), kinds.bias_of(cell)
        return _numbers(weight).reshape(len(weight), -1), None if bias is None else _numbers(bias)

    def stages(self, layers: Sequence[str], behind: Collection[str]) -> Iterator[RepairStage]:
        yield WholePair(self._dense, self._pruned, layers, self._data)

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        cell = bridge.get_module(self._pruned, path)
        _put(kinds.weight_of(cell), weight)
        if bias is not None:
            held = kinds.bias_of(cell)
            assert held is not None
            _put(held, bias)


class WholePair:
    """Both cells whole: every layer costs a forward of each.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        layers: paths in the order they run.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell, layers: Sequence[str], data: Iterable[Any]) -> None:
        self._dense, self._pruned, self.layers, self._data = dense, pruned, list(layers), data

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        cell = bridge.get_module(self._pruned, path)
        with _seeing(self._dense, path) as before, _seeing(self._pruned, path) as after:
            for batch in self._data:
                padding = padding_of(self._pruned, batch)
                for (_, wanted), (given, _) in zip(before(batch), after(batch)):
                    given, wanted = (real_rows(padding, path, x) for x in (given, wanted))
                    yield input_rows(cell, given), output_rows(cell, wanted)


def _numbers(tensor: ms.Tensor) -> Array:
    # By way of float32: bfloat16 tensors give no array.
    found: Array = tensor.astype(ms.float32).asnumpy().astype(np.float64)
    return found


def _put(parameter: ms.Parameter, values: Array) -> None:
    whole = np.ascontiguousarray(values.reshape(parameter.shape), dtype=np.float32)
    parameter.set_data(ms.Tensor(whole).astype(parameter.dtype))


@contextlib.contextmanager
def _seeing(model: nn.Cell, path: str) -> Iterator[Callable[[Any], list[tuple[Array, Array]]]]:
    """A function that sends a batch through and returns input and output of one layer at each of its calls."""
    calls: list[tuple[Array, Array]] = []

    def seen(_name: str, inputs: Any, output: Any) -> None:
        calls.append((_numbers(inputs[0]), _numbers(output)))

    with replaying(model) as run, bridge.hooked({path: bridge.get_module(model, path)}, seen):

        def send(batch: Any) -> list[tuple[Array, Array]]:
            calls.clear()
            run(batch)
            return list(calls)

        yield send
