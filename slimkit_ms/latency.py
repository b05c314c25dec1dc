"""`measure_latency`: a table of a MindSpore network's latency by widths, for `PruneMindSpore.set_budget`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit.core.files import PathLike
from slimkit.core.lazy import door
from slimkit.core.prune.latency import LatencyTable
from slimkit.core.prune.measuring import measure
from slimkit.core.prune.onnx_times import OnnxTimes
from slimkit_ms import bridge
from slimkit_ms.export import export_onnx
from slimkit_ms.prune import PruneMindSpore

from mindspore import nn

__getattr__, __dir__ = door("slimkit_ms", room="prune")


def measure_latency(
    model: nn.Cell,
    inputs: Any,
    path: PathLike | None = None,
    *,
    alignment: int = 16,
    opset: int = 13,
    run: Callable[[Path], float] | None = None,
    device: str = "",
) -> LatencyTable:
    """Time a network by its widths: each kind of layer alone at a few of them, and the whole network at seven cuts.

    As `slimkit.measure_latency` does it; one table serves both frameworks.

    Args:
        model: the cell; it stays as it is.
        inputs: what it takes, of the size that it serves: a tensor, or a tuple or list of tensors.
        path: a file to keep the table in; one that is there is added to.
        alignment: as the pruner will have it; widths are timed at multiples of it.
        opset: of the ONNX files; from 17 on layer norms are one operator.
        run: times one ONNX file on another device: its path -> milliseconds.
        device: the name of that device, for the table.

    Returns:
        The table, for `PruneMindSpore(model, inputs).set_budget("latency", table)`.

    Raises:
        FileFormatError: `path` holds a table of another device, runtime or version.
        UnsupportedError: the network cannot be written as ONNX.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(32, 64), nn.ReLU(), nn.Dense(64, 64), nn.ReLU(), nn.Dense(64, 4))
        >>> table = measure_latency(net, ops.ones((1, 32)))
        >>> table.runtime
        'onnxruntime'
    """
    bridge.check_model(model)
    times = onnx_times(inputs, opset, run, device)
    return measure(times, copy.deepcopy(model), lambda m: PruneMindSpore(m, inputs), path, alignment)


def onnx_times(inputs: Any, opset: int = 13, run: Callable[[Path], float] | None = None, device: str = "") -> OnnxTimes:
    """What times networks of these inputs; see `measure_latency` for the arguments."""

    def export(small: nn.Cell, target: Path) -> None:
        export_onnx(small, inputs, target, opset=opset, tolerance=1e-2)

    def feeds(small: nn.Cell) -> dict[str, Any]:
        tensors = inputs if isinstance(inputs, (tuple, list)) else [inputs]
        return dict(zip(inspect.signature(small.construct).parameters, (bridge.as_numpy(t) for t in tensors)))

    return OnnxTimes(export, feeds, run, device)
