"""ONNX and MINDIR files that are proven against the cell they came from."""

from __future__ import annotations

import copy
import inspect
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import slimkit_ms
from slimkit.core import check, onnxaxes
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import PathLike, as_path, atomic_directory, atomic_file, link_or_copy, place_file
from slimkit.core.lazy import library
from slimkit.core.onnxfile import OnnxReport, Proof, publish, unique
from slimkit.core.showing import Shown
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

# What MindSpore calls the pieces of a MINDIR beyond 1 GB: NAME_graph.mindir and the folder NAME_variables.
_GRAPH, _VARIABLES = "_graph.mindir", "_variables"
# File names that MindSpore takes.
_WRITABLE = re.compile(r"[0-9a-zA-Z@_\-.:]+")


@dataclass(frozen=True, repr=False)
class MindirReport(Shown):
    """What was written and how well it agrees with the cell.

    Args:
        path: the file; beyond 1 GB MindSpore writes NAME_graph.mindir instead of NAME.mindir.
        file_bytes: its size, with the folder of weights beside it where there is one.
        differences: output name -> largest absolute difference between the reloaded file and the cell.
        data_folder: name of the folder beside it that holds the weights; None: they are in the file itself.
    """

    path: str
    file_bytes: int
    differences: dict[str, float]
    data_folder: str | None = None

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
    path: PathLike,
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
        dynamic_batch: leave the first axis of every input open.
        dynamic: axes to leave open: ``{"x": {0: "batch"}}`` by the names of construct's arguments, or ``{0: "batch"}``
            for every input. The file is proven at a second size; a cell that computes with its input's sizes keeps
            them as constants and is refused.
        tolerance: largest absolute difference between file and cell that is accepted, float32 units.
        external_data: put the weights into `path` and ".data" beside the file; None: where they exceed 2 GB, which one
            ONNX file cannot hold.
        merge_delta: write a copy of the cell with its LoRAs merged; the cell keeps them.

    Returns:
        What was written, with the opset read back from the file and the difference of each output.

    Raises:
        ArgumentTypeError: `model` is not a cell.
        ArgumentError: an opset outside 11 to 20, inputs that are not tensors, or an open axis that no input has.
        UnsupportedError: the cell cannot be written at that opset, does not run at a second size of an open axis, or
            the file disagrees with it.
        MissingFrameworkError: onnx or onnxruntime is not installed.

    Example:
        >>> export_onnx(nn.Dense(4, 3), ms.ops.ones((1, 4)), "/tmp/dense.onnx").opset
        13
    """
    check.integer(opset, "opset", minimum=11, maximum=20)
    check.number(tolerance, "tolerance", minimum=0)
    target = as_path(path, "path")
    library("onnx", "onnx")
    if external_data is not None:
        check.boolean(external_data, "external_data")
    tensors = _tensors(bridge.check_model(model), inputs)
    names = list(inspect.signature(model.construct).parameters)[: len(tensors)]
    feeds = dict(zip(names, (bridge.as_numpy(t) for t in tensors)))
    shapes = {name: array.shape for name, array in feeds.items()}
    axes = onnxaxes.open_axes(dynamic, dynamic_batch, shapes)
    if check.boolean(merge_delta, "merge_delta"):
        model = copy.deepcopy(model)
        slimkit_ms.merge_delta(model, unload=True)
    with bridge.evaluating(model):
        answers = [outputs(model(*tensors))]
        proofs = [feeds]
        if axes:
            sizes = onnxaxes.other_sizes(axes, shapes)
            proofs.append({n: onnxaxes.resized(a, axes.get(n, {}), sizes) for n, a in feeds.items()})
            answers.append(_again(model, proofs[1], sizes))
        proto = _graph(model, tensors, names, axes)
    proto = _at_opset(proto, opset)
    _put_weights(proto, model)
    known = [o.name for o in proto.graph.output]
    expected = [dict(zip(known, found.values())) for found in answers]
    if axes:
        kinds = [{name: array.shape for name, array in found.items()} for found in expected]
        _name_axes(proto, onnxaxes.output_axes(kinds[0], kinds[1], sizes))
    pairs = [Proof(given, found) for given, found in zip(proofs, expected)]
    return publish(proto, target, opset, pairs, tolerance, external_data, axes)


def _again(model: nn.Cell, arrays: dict[str, np.ndarray], sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """The cell's answer at the other sizes."""
    try:
        return outputs(model(*(ms.Tensor(array) for array in arrays.values())))
    except Exception as error:  # the cell raises what it likes
        tried = ", ".join(f"{label} {after}" for label, (_, after) in sizes.items())
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"dynamic: the cell does not run with {tried}; leave that axis fixed: {reason}"
        ) from error


def _graph(model: nn.Cell, tensors: tuple[ms.Tensor, ...], names: list[str], axes: onnxaxes.Axes) -> Any:
    """The graph at the opset that MindSpore writes, its parameters as inputs: so it is small whatever they weigh."""
    onnx = library("onnx", "onnx")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        # MindSpore changes the graph that it compiled for a file, and cannot write it a second time.
        keep = {p for _, cell in model.cells_and_names() for p in cell.compile_cache if "export.onnx" not in p}
        bridge.forget_graphs(model, keep)
        try:
            ms.onnx.export(
                model, *tensors, file_name=file, input_names=names, export_params=False, dynamic_axes=axes or None
            )  # fmt: skip
        except Exception as error:  # MindSpore raises dozens of kinds; each means the same to the caller
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"the cell cannot be written as ONNX: {reason}") from error
        finally:
            bridge.forget_graphs(model, keep)
        return onnx.load(file)


def _at_opset(proto: Any, opset: int) -> Any:
    onnx = library("onnx", "onnx")
    if proto.opset_import[0].version == opset:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # the converter raises plain RuntimeErrors of many texts
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"the cell cannot be written as ONNX opset {opset}: {reason}") from error


def _put_weights(proto: Any, model: nn.Cell) -> None:
    """Make the inputs that are parameters of the cell into the weights they are, in place."""
    onnx = library("onnx", "onnx")
    held = {p.name: p for p, _ in bridge.parameter_paths(model)}
    inputs = list(proto.graph.input)
    del proto.graph.input[:]
    for one in inputs:
        if one.name in held:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(held[one.name].asnumpy(), one.name))
        else:
            proto.graph.input.append(one)


def _name_axes(proto: Any, axes: onnxaxes.Axes) -> None:
    """Write the open axes of the outputs, in place."""
    for output in proto.graph.output:
        for axis, label in axes.get(output.name, {}).items():
            output.type.tensor_type.shape.dim[axis].dim_param = label


def export_mindir(
    model: nn.Cell, inputs: Any, path: PathLike, *, tolerance: float = 1e-4, merge_delta: bool = False
) -> MindirReport:
    """Write a cell as MINDIR and prove the file by loading and running it.

    Args:
        model: the cell; it is exported in eval mode and left as it was.
        inputs: what `model(*inputs)` takes: a tensor, or a tuple or list of tensors.
        path: the file to write, ending in .mindir; it appears whole or not at all. Beyond 1 GB of parameters MindSpore
            writes two pieces, NAME_graph.mindir and the folder NAME_variables, which must stay together.
        tolerance: largest absolute difference between file and cell that is accepted, float32 units.
        merge_delta: write a copy of the cell with its LoRAs merged; the cell keeps them.

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
    if check.boolean(merge_delta, "merge_delta"):
        model = copy.deepcopy(model)
        slimkit_ms.merge_delta(model, unload=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.stem if _WRITABLE.fullmatch(target.stem) else "model"
    with (
        bridge.evaluating(model),
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as folder,
        tempfile.TemporaryDirectory() as plain,
    ):
        expected = outputs(model(*tensors))
        # MindSpore refuses paths with spaces or letters beyond ASCII: it gets there by a link.
        link = Path(plain, "out")
        link.symlink_to(Path(folder).resolve(), target_is_directory=True)
        try:
            ms.export(model, *tensors, file_name=str(link / name), file_format="MINDIR")
        except Exception as error:  # MindSpore raises dozens of kinds; each means the same to the caller
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"the cell cannot be written as MINDIR: {reason}") from error
        graph, weights = Path(folder, name + _GRAPH), Path(folder, name + _VARIABLES)
        split = graph.exists()
        if split and name != target.stem:
            check.wrong_value("path", "a name of ASCII letters, digits, - and _ for a cell beyond 1 GB", str(path))
        graph = graph if split else Path(folder, f"{name}.mindir")
        found = outputs(nn.GraphCell(ms.load(str(link / graph.name)))(*tensors))
        gaps = {name: float(np.abs(expected[name] - found[name]).max(initial=0)) for name in expected}
        if not all(gap <= tolerance for gap in gaps.values()):
            raise UnsupportedError(f"the MINDIR file differs from the cell by more than {tolerance:g}: {gaps}")
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        os.chmod(graph, 0o600)  # MindSpore leaves it read-only
        written = target.parent / graph.name if split else target
        if split:
            _place_weights(weights, graph, target.parent)
        place_file(graph, written)
        if split:
            shutil.rmtree(target.parent / f"{name}_2{_VARIABLES}", ignore_errors=True)
    return MindirReport(str(written), size, gaps, weights.name if split else None)


def _place_weights(weights: Path, graph: Path, place: Path) -> None:
    """Put a graph's folder of weights in the place of an older one, so that each graph finds its own weights.

    Where there is one already, the new weights come first under a second name, with a graph that reads them there.
    """
    if (place / weights.name).exists():
        from mindspore.train.mind_ir_pb2 import ModelProto

        second = weights.name.removesuffix(_VARIABLES) + f"_2{_VARIABLES}"
        proto = ModelProto()
        proto.ParseFromString(graph.read_bytes())
        for tensor in proto.graph.parameter:
            if tensor.HasField("external_data"):
                tensor.external_data.location = f"{second}/{Path(tensor.external_data.location).name}"
        with atomic_directory(place / second) as folder:
            for file in weights.iterdir():
                link_or_copy(file, folder / file.name)
        with atomic_file(place / graph.name) as handle:
            handle.write(proto.SerializeToString())
    with atomic_directory(place / weights.name) as folder:
        for file in weights.iterdir():
            shutil.move(file, folder / file.name)


def _tensors(model: nn.Cell, inputs: Any) -> tuple[ms.Tensor, ...]:
    args, kwargs = bridge.call_of(inputs)
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
