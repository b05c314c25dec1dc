"""`measure_latency`: a table of a torch network's latency by widths, for `PruneTorch.set_budget`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core.files import PathLike
from slimkit.core.lazy import door
from slimkit.core.prune.latency import LatencyTable
from slimkit.core.prune.measuring import measure
from slimkit.core.prune.onnx_times import OnnxTimes
from slimkit.export import example_arrays, export_onnx
from slimkit.prune import PruneTorch

from torch import nn

__getattr__, __dir__ = door("slimkit", room="prune")


def measure_latency(
    model: nn.Module,
    inputs: Any,
    path: PathLike | None = None,
    *,
    alignment: int = 16,
    opset: int = 13,
    run: Callable[[Path], float] | None = None,
    device: str = "",
) -> LatencyTable:
    """Time a network by its widths: each kind of layer alone at a few of them, and the whole network at seven cuts.

    Layers are told apart by their kind and sizes, and what a table holds is not timed again. Times are of onnxruntime
    on this CPU, one thread, the fastest of many runs by the thread's own clock, or of whatever `run` does.

    Args:
        model: the network; it stays as it is.
        inputs: what it takes, of the size that it serves: the batch counts.
        path: a file to keep the table in; one that is there is added to.
        alignment: as the pruner will have it; widths are timed at multiples of it.
        opset: of the ONNX files; from 17 on layer norms are one operator.
        run: times one ONNX file on another device: its path -> milliseconds.
        device: the name of that device, for the table.

    Returns:
        The table, for `PruneTorch(model, inputs).set_budget("latency", table)`.

    Raises:
        FileFormatError: `path` holds a table of another device, runtime or version.
        UnsupportedError: the network cannot be written as ONNX.

    Example:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> table = measure_latency(net, torch.ones(1, 32))
        >>> table.runtime
        'onnxruntime'
    """
    bridge.check_model(model)
    times = onnx_times(inputs, opset, run, device)
    with bridge.evaluating(model):
        return measure(times, copy.deepcopy(model), lambda m: PruneTorch(m, inputs), path, alignment)


def onnx_times(inputs: Any, opset: int = 13, run: Callable[[Path], float] | None = None, device: str = "") -> OnnxTimes:
    """What times networks of these inputs; see `measure_latency` for the arguments."""

    def export(small: nn.Module, target: Path) -> None:
        export_onnx(small, inputs, target, opset=opset, tolerance=1e-2)

    return OnnxTimes(export, lambda _: example_arrays(inputs), run, device)
