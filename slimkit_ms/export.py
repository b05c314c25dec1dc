"""ONNX and MINDIR files that are proven against the cell they came from."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import slimkit_ms
from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import as_path, atomic_file
from slimkit.core.lazy import library
from slimkit.core.onnxfile import OnnxReport, Proof, publish, unique
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn


@dataclass(frozen=True)
class MindirReport:
    """What was written and how well it agrees with the cell.

    Args:
        path: the file.
        file_bytes: its size.
        differences: output name -> largest absolute difference between the reloaded file and the cell.
    """

    path: str
    file_bytes: int
    differences: dict[str, float]

    @property
    def max_difference(self) -> float:
        """The largest difference over all outputs."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "max_difference": self.max_difference}


def export_onnx(
    model: nn.Cell,
    inputs: Any,
    path: Any,
    *,
    opset: int = 13,
    dynamic_batch: bool = False,
    dynamic: Any = None,
    tolerance: float = 1e-4,
    external_data: bool | None = None,
    merge_delta: bool = False,
) -> OnnxReport:
    """Write a cell as ONNX and prove the file against the cell in onnxruntime.

    MindSpore itself writes opset 11; a higher one is reached by onnx's own version converter, and proven like any.

    Args:
        model: the cell; it is exported in eval mode and left as it was.
        inputs: what `model(*inputs)` takes: a tensor, or a tuple or list of tensors.
        path: the file to write; it appears whole or not at all.
        opset: the ONNX opset to write, 11 to 20. The default 13 is one that Ascend's ATC of CANN 5 to 9 reads.
        dynamic_batch: must be False: MindSpore 2.10 writes fixed shapes here.
        dynamic: must be None, for the same reason.
        tolerance: largest absolute difference between file and cell that is accepted, float32 units.
        external_data: put the weights into `path` and ".data" beside the file; None and False: into the file, for
            MindSpore cannot write 2 GB of them anyway.
        merge_delta: write a copy of the cell with its LoRAs merged; the cell keeps them.

    Returns:
        What was written, with the opset read back from the file and the difference of each output.

    Raises:
        ArgumentTypeError: `model` is not a cell.
        ArgumentError: an opset outside 11 to 20, or inputs that are not tensors.
        UnsupportedError: the cell cannot be written at that opset, or the file disagrees with it.
        MissingFrameworkError: onnx or onnxruntime is not installed.

    Example:
        >>> export_onnx(nn.Dense(4, 3), ms.ops.ones((1, 4)), "/tmp/dense.onnx").opset
        13
    """
    check.integer(opset, "opset", minimum=11, maximum=20)
    check.number(tolerance, "tolerance", minimum=0)
    if check.boolean(dynamic_batch, "dynamic_batch") or dynamic is not None:
        raise UnsupportedError("dynamic: MindSpore 2.10 writes ONNX with fixed shapes; export each size.")
    target = as_path(path, "path")
    onnx = library("onnx", "onnx")
    if external_data is not None:
        check.boolean(external_data, "external_data")
    tensors = _tensors(bridge.check_model(model), inputs)
    if check.boolean(merge_delta, "merge_delta"):
        model = copy.deepcopy(model)
        slimkit_ms.merge_delta(model, unload=True)
    _check_size(model, 2**31 - 2**24, "ONNX")
    with bridge.evaluating(model):
        expected = outputs(model(*tensors))
        data = _file(model, tensors, "ONNX")
    proto = onnx.load_from_string(data)
    if proto.opset_import[0].version != opset:
        try:
            data = onnx.version_converter.convert_version(proto, opset).SerializeToString()
        except Exception as error:  # the converter raises plain RuntimeErrors of many texts
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"the cell cannot be written as ONNX opset {opset}: {reason}") from error
        proto = onnx.load_from_string(data)
    names = [i.name for i in proto.graph.input if i.name not in {t.name for t in proto.graph.initializer}]
    feeds = dict(zip(names, (bridge.as_numpy(t) for t in tensors)))
    arrays = dict(zip((o.name for o in proto.graph.output), expected.values()))
    return publish(data, target, opset, [Proof(feeds, arrays)], tolerance, external_data)


def export_mindir(model: nn.Cell, inputs: Any, path: Any, *, tolerance: float = 1e-4) -> MindirReport:
    """Write a cell as MINDIR and prove the file by loading and running it.

    Args:
        model: the cell; it is exported in eval mode and left as it was.
        inputs: what `model(*inputs)` takes: a tensor, or a tuple or list of tensors.
        path: the file to write, ending in .mindir; it appears whole or not at all.
        tolerance: largest absolute difference between file and cell that is accepted, float32 units.

    Returns:
        What was written and the difference of each output.

    Raises:
        ArgumentTypeError: `model` is not a cell.
        ArgumentError: a path that does not end in .mindir, or inputs that are not tensors.
        UnsupportedError: the cell cannot be written, or the file disagrees with it.

    Example:
        >>> export_mindir(nn.Dense(4, 3), ms.ops.ones((1, 4)), "/tmp/dense.mindir").max_difference
        0.0
    """
    check.number(tolerance, "tolerance", minimum=0)
    target = as_path(path, "path")
    if target.suffix != ".mindir":
        check.wrong_value("path", "a file name that ends in .mindir", str(path))
    tensors = _tensors(bridge.check_model(model), inputs)
    _check_size(model, 2**30, "MINDIR")
    with bridge.evaluating(model):
        expected = outputs(model(*tensors))
        data = _file(model, tensors, "MINDIR")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "proof.mindir")
        copy.write_bytes(data)
        found = outputs(nn.GraphCell(ms.load(str(copy)))(*tensors))
    gaps = {name: float(np.abs(expected[name] - found[name]).max(initial=0)) for name in expected}
    if not all(gap <= tolerance for gap in gaps.values()):
        raise UnsupportedError(f"the MINDIR file differs from the cell by more than {tolerance:g}: {gaps}")
    with atomic_file(target) as handle:
        handle.write(data)
    return MindirReport(str(target), len(data), gaps)


def _tensors(model: nn.Cell, inputs: Any) -> tuple[ms.Tensor, ...]:
    args, kwargs = as_call(inputs)
    if kwargs or not args or not all(isinstance(a, ms.Tensor) for a in args):
        check.wrong_value("inputs", "a tensor, or a tuple or list of tensors", inputs)
    return args


def outputs(output: Any, name: str = "output") -> dict[str, np.ndarray]:
    """The tensors of a cell's output, in order, each with a name."""

    def flat(value: Any) -> list[ms.Tensor]:
        if isinstance(value, tuple | list):
            return [t for v in value for t in flat(v)]
        return [value] if isinstance(value, ms.Tensor) else []

    tensors = flat(output)
    return dict(zip(unique([name] * len(tensors)), (bridge.as_numpy(t) for t in tensors)))


def _check_size(model: nn.Cell, most: int, file_format: str) -> None:
    """Refuse what MindSpore writes in several files (MINDIR beyond 1 GB) or not at all (ONNX beyond 2 GB)."""
    size = sum(p.nbytes for p, _ in bridge.parameter_paths(model))
    if size > most:
        raise UnsupportedError(f"{size:,} bytes of parameters: one {file_format} file of MindSpore holds {most:,}.")


def _file(model: nn.Cell, tensors: tuple[ms.Tensor, ...], file_format: str) -> bytes:
    """The bytes that ms.export writes, by way of a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ms.export(model, *tensors, file_name=os.path.join(folder, "model"), file_format=file_format)
        except Exception as error:  # MindSpore raises dozens of kinds; each means the same to the caller
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"the cell cannot be written as {file_format}: {reason}") from error
        return Path(folder, f"model.{file_format.lower()}").read_bytes()
