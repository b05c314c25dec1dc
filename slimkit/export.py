"""ONNX files that hold the opset asked for and are proven against the model they came from."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import as_path, atomic_file
from slimkit.core.lazy import library

import torch
from torch import nn

# torch's two exporters: the older one writes any opset up to 17 as asked; the newer one begins at 18 and
# would write 18 in silence when asked for less.
_OLDER_LIMIT = 17
_NEWER_LIMIT = 20


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how well it agrees with the model.

    Args:
        path: the file.
        opset: the opset of the default domain, read back from the file.
        file_bytes: its size.
        operators: operator -> how many nodes.
        zeros: exact zeros among the file's weights of two or more axes.
        weights: entries of those weights.
        differences: output name -> largest absolute difference between onnxruntime and the model.
        inputs: input names in order.
    """

    path: str
    opset: int
    file_bytes: int
    operators: dict[str, int]
    zeros: int
    weights: int
    differences: dict[str, float]
    inputs: list[str]

    @property
    def max_difference(self) -> float:
        """The largest difference over all outputs."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "max_difference": self.max_difference}


class _Flat(nn.Module):
    """A model with positional tensors in and a tuple of tensors out, which is all that ONNX knows."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._args, self._kwargs = args, dict(kwargs)
        self._slots = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        self._keys = [k for k, v in self._kwargs.items() if isinstance(v, torch.Tensor)]

    def tensors(self) -> list[torch.Tensor]:
        return [self._args[i] for i in self._slots] + [self._kwargs[k] for k in self._keys]

    def names(self) -> list[str]:
        alone = len(self._slots) == 1
        return ["input" if alone else f"input_{i}" for i in range(len(self._slots))] + list(self._keys)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = list(self._args), dict(self._kwargs)
        args_given = iter(tensors)
        for slot in self._slots:
            args[slot] = next(args_given)
        for key in self._keys:
            kwargs[key] = next(args_given)
        return tuple(t for _, t in _named_tensors(self.model(*args, **kwargs)))


def _named_tensors(output: Any, name: str = "output") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a model's output, in order, each with a name."""
    if isinstance(output, torch.Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        return [pair for key, value in output.items() for pair in _named_tensors(value, str(key))]
    if isinstance(output, tuple | list):
        return [pair for i, value in enumerate(output) for pair in _named_tensors(value, f"{name}_{i}")]
    return []


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: Any,
    *,
    opset: int = 13,
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> OnnxReport:
    """Write a model as ONNX and prove the file against the model in onnxruntime.

    Args:
        model: the model; it is exported in eval mode from a copy of its structure and left as it was.
        inputs: what `model(*inputs)` takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        path: the file to write; it appears whole or not at all.
        opset: the ONNX opset to write, 9 to 20. The default 13 is one that Ascend's ATC of CANN 5 to 9 reads.
        dynamic_batch: leave the first axis of every input open.
        tolerance: largest absolute difference between file and model that is accepted, float32 units.

    Returns:
        What was written, with the opset read back from the file and the difference of each output.

    Raises:
        ArgumentTypeError: `model` is not a module.
        ArgumentError: an opset outside 9 to 20, or inputs without a tensor.
        UnsupportedError: the model cannot be written at that opset, or the file disagrees with the model.
        MissingFrameworkError: onnx or onnxruntime is not installed.

    Example:
        >>> export_onnx(nn.Linear(4, 3), torch.ones(1, 4), "/tmp/linear.onnx").opset
        13
    """
    bridge.check_model(model)
    check.integer(opset, "opset", minimum=9, maximum=_NEWER_LIMIT)
    check.number(tolerance, "tolerance", minimum=0)
    target = as_path(path, "path")
    onnx = library("onnx", "onnx")
    args, kwargs = as_call(bridge.to_device(inputs, bridge.device_of(model)))
    flat = _Flat(model, args, kwargs)
    if not flat.tensors():
        check.wrong_value("inputs", "a batch with at least one tensor", inputs)
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= 2**31:
        raise UnsupportedError("the model is larger than 2 GB, which one ONNX file cannot hold.")
    with bridge.evaluating(model), _exportable_attention(model, opset):
        expected = _named_tensors(bridge.run(model, inputs))
        output_names = _unique([name for name, _ in expected])
        data = _write(flat, opset, flat.names(), output_names, dynamic_batch)
    proto = onnx.load_from_string(data)
    written = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if written != opset:
        raise UnsupportedError(f"the exporter wrote opset {written}, not the {opset} asked for. Try another opset.")
    arrays = [t.detach().cpu().numpy() for _, t in expected]
    feeds = dict(zip(flat.names(), (t.detach().cpu().numpy() for t in flat.tensors())))
    differences = _compare(data, feeds, dict(zip(output_names, arrays)))
    if not all(d <= tolerance for d in differences.values()):
        shown = ", ".join(f"{k} {v:.3g}" for k, v in differences.items())
        raise UnsupportedError(f"the ONNX file differs from the model by more than {tolerance:g}: {shown}")
    with atomic_file(target) as handle:
        handle.write(data)
    weights = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) >= 2]
    return OnnxReport(
        path=str(target),
        opset=written,
        file_bytes=len(data),
        operators=dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
        zeros=sum(int((w == 0).sum()) for w in weights),
        weights=sum(w.size for w in weights),
        differences=differences,
        inputs=list(feeds),
    )


def _write(flat: _Flat, opset: int, inputs: list[str], outputs: list[str], dynamic_batch: bool) -> bytes:
    """The bytes of the ONNX file, by the exporter that honours the opset."""
    tensors = tuple(flat.tensors())
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # The older exporter announces its removal on every call; the opset is read back from the file anyway.
            warnings.simplefilter("ignore")
            if opset <= _OLDER_LIMIT:
                axes = {name: {0: "batch"} for name in (*inputs, *outputs)} if dynamic_batch else None
                torch.onnx.export(
                    flat, tensors, buffer, opset_version=opset, input_names=inputs, output_names=outputs,
                    dynamic_axes=axes, dynamo=False, do_constant_folding=True,
                )  # fmt: skip
            else:
                batch = torch.export.Dim("batch")
                shapes = (tuple({0: batch} for _ in tensors),) if dynamic_batch else None
                program = torch.onnx.export(
                    flat, tensors, opset_version=opset, input_names=inputs, output_names=outputs,
                    dynamic_shapes=shapes, dynamo=True, verbose=False,
                )  # fmt: skip
                return program.model_proto.SerializeToString()
    except Exception as error:  # the exporters raise dozens of kinds; each means the same to the caller
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"the model cannot be written as ONNX opset {opset}: {reason}") from error
    return buffer.getvalue()


@contextlib.contextmanager
def _exportable_attention(model: nn.Module, opset: int) -> Iterator[None]:
    """Below opset 14 fused attention cannot be written: a Hugging Face model uses its plain one meanwhile."""
    config = getattr(model, "config", None)
    used = getattr(config, "_attn_implementation", None)
    if opset >= 14 or used in (None, "eager") or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(used)


def _unique(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append(name if not seen[name] else f"{name}_{seen[name]}")
        seen[name] += 1
    return unique


def _session(file: bytes | str) -> Any:
    runtime = library("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _compare(data: bytes, feeds: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference of each output; infinite where shapes or infinities disagree."""
    session = _session(data)
    known = {i.name for i in session.get_inputs()}
    # An input that the graph does not use is not an input of the file.
    results = session.run(list(expected), {k: v for k, v in feeds.items() if k in known})
    differences = {}
    for (name, want), got in zip(expected.items(), results):
        if want.shape != got.shape or not np.array_equal(np.isfinite(want), np.isfinite(got)):
            differences[name] = float("inf")
        else:
            gap = np.abs(np.nan_to_num(want.astype(np.float64)) - np.nan_to_num(got.astype(np.float64)))
            differences[name] = float(gap.max(initial=0.0))
    return differences


def onnx_latency(files: Mapping[str, Any], inputs: Mapping[str, np.ndarray], budget_s: float = 2.0) -> dict[str, float]:
    """Median milliseconds of each ONNX file in onnxruntime on this CPU, one thread, runs taken in turn.

    Args:
        files: label -> path; all take the same inputs.
        inputs: input name -> array.
        budget_s: seconds to spend on all of them together.

    Returns:
        label -> median milliseconds.
    """
    sessions = {label: _session(str(path)) for label, path in files.items()}
    feeds = {label: {i.name: inputs[i.name] for i in session.get_inputs()} for label, session in sessions.items()}
    times: dict[str, list[float]] = {label: [] for label in sessions}
    end = time.perf_counter() + budget_s
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        # In turn, so that a drift of the machine's speed meets all of them alike.
        for label, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds[label])
            times[label].append(1000 * (time.perf_counter() - began))
    return {label: statistics.median(values[1:]) for label, values in times.items()}


def example_arrays(inputs: Any) -> dict[str, np.ndarray]:
    """The arrays that a file written by `export_onnx` for these inputs takes, by input name."""
    flat = _Flat(nn.Identity(), *copy.copy(as_call(inputs)))
    return dict(zip(flat.names(), (t.detach().cpu().numpy() for t in flat.tensors())))
