"""ONNX files: proven against the arrays they should give, timed, and described by what they hold."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.files import atomic_file, place_file
from slimkit.core.lazy import library
from slimkit.core.onnxshared import store_once
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]

# A protobuf file ends at 2 GiB; the graph needs a little of it.
_LARGEST_BYTES = 2**31 - 2**24


@dataclass(frozen=True, repr=False)
class OnnxReport(Shown):
    """What was written and how well it agrees with the model.

    Args:
        path: the file.
        opset: the opset of the default domain, read back from the file.
        file_bytes: its size, with the file of weights beside it where there is one.
        operators: operator -> how many nodes.
        zeros: exact zeros among the file's weights of two or more axes.
        weights: entries of those weights.
        differences: output name -> largest absolute difference between onnxruntime and the model.
        inputs: input names in order.
        data_file: name of the file beside it that holds the weights; None: they are in the file itself.
        open_axes: input -> {axis: name} of the axes whose size is left open.
    """

    path: str
    opset: int
    file_bytes: int
    operators: dict[str, int]
    zeros: int
    weights: int
    differences: dict[str, float]
    inputs: list[str]
    data_file: str | None = None
    open_axes: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def max_difference(self) -> float:
        """The largest difference over all outputs."""
        return max(self.differences.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "max_difference": self.max_difference}


@dataclass(frozen=True)
class Proof:
    """What goes into a file and what should come out of it.

    Args:
        feeds: input name -> array.
        expected: output name -> array, in the file's order.
    """

    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]


def publish(
    source: Any,
    path: Path,
    opset: int,
    proofs: Sequence[Proof],
    tolerance: float,
    external_data: bool | None = None,
    open_axes: dict[str, dict[int, str]] | None = None,
) -> OnnxReport:
    """Prove an ONNX file against the arrays it should give, and only then write it.

    Args:
        source: where an exporter left the file, with or without files of weights beside it; or the model itself.
        path: where it goes; it appears whole or not at all. With external data there is also a file of that name and
            ".data"; at no moment does a model there meet another one's weights.
        opset: the opset that was asked for.
        proofs: what goes in and should come out, at each size that is to be proven.
        tolerance: largest absolute difference accepted.
        external_data: put the weights into a file beside it; None: where one file could not hold them (2 GB).
        open_axes: for the report.

    Returns:
        What was written.

    Raises:
        FileFormatError: the exporter's file is not an ONNX model.
        UnsupportedError: the opset or the outputs are not those asked for, or the weights do not fit in one file.
    """
    onnx = library("onnx", "onnx")
    try:
        proto = onnx.load(str(source)) if isinstance(source, Path) else source
    except Exception as error:  # protobuf raises its own kinds, which differ between its back ends
        raise FileFormatError(f"the exporter's output is not an ONNX model: {error}") from error
    written = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if written != opset:
        raise UnsupportedError(f"the exporter wrote opset {written}, not the {opset} asked for. Ask for {written}.")
    store_once(proto)
    # Found before the weights leave the model: afterwards their entries only say where they went.
    weights = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) >= 2]
    zeros, entries = sum(int((w == 0).sum()) for w in weights), sum(int(w.size) for w in weights)
    del weights
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as folder:
        files = _write(proto, Path(folder, path.name), external_data)
        differences = _compare(str(files[-1]), proofs)
        if not all(d <= tolerance for d in differences.values()):
            shown = ", ".join(f"{k} {v:.3g}" for k, v in differences.items())
            raise UnsupportedError(f"the ONNX file differs from the model by more than {tolerance:g}: {shown}")
        size = sum(file.stat().st_size for file in files)
        _place(files, path)
    return OnnxReport(
        path=str(path),
        opset=opset,
        file_bytes=size,
        operators=dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
        zeros=zeros,
        weights=entries,
        differences=differences,
        inputs=list(proofs[0].feeds),
        data_file=files[0].name if len(files) > 1 else None,
        open_axes=open_axes or {},
    )


def _place(written: Sequence[Path], path: Path) -> None:
    """Put a model, and before it the weights beside it, in the place of an older one; each model finds its own weights.

    Where there are weights of that name already, the new ones come first under a second name, with a model that reads
    them there; its rename is the one that counts. What follows brings the usual name back.
    """
    *data, graph = written
    second = path.with_name(f"{path.name}.2.data")
    if data and path.with_name(data[0].name).exists():
        onnx = library("onnx", "onnx")
        proto = onnx.load(str(graph), load_external_data=False)
        for entry in (e for t in proto.graph.initializer for e in t.external_data if e.key == "location"):
            entry.value = second.name
        shutil.copyfile(data[0], data[0].with_name(second.name))  # onnx reads no file that has a second hard link
        place_file(data[0].with_name(second.name), second)
        with atomic_file(path) as handle:
            handle.write(proto.SerializeToString())
    for file in written:
        place_file(file, path.with_name(file.name))
    second.unlink(missing_ok=True)
    if not data and (left := path.with_name(f"{path.name}.data")).is_file() and not left.is_symlink():
        left.unlink()  # of the older model, which kept its weights beside it


def _write(proto: Any, file: Path, external: bool | None) -> list[Path]:
    """Write a model, with its weights inside or in a file beside it; returns the files, the model's own last."""
    onnx = library("onnx", "onnx")
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > _LARGEST_BYTES and external is False:
        raise UnsupportedError(f"external_data=False: {size:,} bytes of weights do not fit in one ONNX file of 2 GB.")
    if not (size > _LARGEST_BYTES if external is None else external):
        file.write_bytes(proto.SerializeToString())
        return [file]
    data = file.with_name(f"{file.name}.data")
    onnx.save_model(
        proto, str(file), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name,
        size_threshold=1024, convert_attribute=False,
    )  # fmt: skip
    return [data, file] if data.exists() else [file]


def unique(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that came before.

    Example:
        >>> unique(["a", "a"])
        ['a', 'a_1']
    """
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append(name if not seen[name] else f"{name}_{seen[name]}")
        seen[name] += 1
    return unique


def _session(file: str) -> Any:
    runtime = library("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _compare(file: str, proofs: Sequence[Proof]) -> dict[str, float]:
    """Largest absolute difference of each output over all proofs; infinite where shapes or infinities disagree."""
    try:
        session = _session(file)
    except Exception as error:  # onnxruntime raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"onnxruntime does not take the ONNX file: {reason}") from error
    known = {i.name for i in session.get_inputs()}
    differences: dict[str, float] = {}
    for proof in proofs:
        # An input that the graph does not use is not an input of the file.
        feeds = {k: v for k, v in proof.feeds.items() if k in known}
        try:
            results = session.run(list(proof.expected), feeds)
        except Exception as error:  # onnxruntime raises its own kinds
            shapes = {name: array.shape for name, array in feeds.items()}
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedError(f"the ONNX file does not run with inputs of {shapes}: {reason}") from error
        for (name, want), got in zip(proof.expected.items(), results):
            differences[name] = max(differences.get(name, 0.0), _gap(want, got))
    return differences


def _gap(want: Array, got: Array) -> float:
    if want.shape != got.shape or not np.array_equal(np.isfinite(want), np.isfinite(got)):
        return float("inf")
    gap = np.abs(np.nan_to_num(want.astype(np.float64)) - np.nan_to_num(got.astype(np.float64)))
    return float(gap.max(initial=0.0))


def onnx_latency(files: Mapping[str, Any], inputs: Mapping[str, Array], budget_s: float = 2.0) -> dict[str, float]:
    """Median milliseconds of each ONNX file in onnxruntime on this CPU, runs taken in turn.

    They are the one thread's own, in which the session runs: what other programs take of the processor is not in them.

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
            began = time.thread_time()
            session.run(None, feeds[label])
            times[label].append(1000 * (time.thread_time() - began))
    return {label: statistics.median(values[1:]) for label, values in times.items()}
