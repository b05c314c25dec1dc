"""Times of layers and networks as ONNX files: in onnxruntime on this CPU, or by a call of the user's."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.lazy import library
from slimkit.core.log import progress

Point = tuple[dict[str, Any], int, int]  # what a layer is built from, its width in, its width out

_TOGETHER = 12  # sessions in memory at once
_LEAST_RUNS, _MOST_RUNS = 5, 200
_BURST = 3  # runs on end, so that what ran before has not emptied the caches of all of them


class OnnxTimes:
    """Times in onnxruntime on this CPU, one thread, of the processor: what runs beside them is not in them.

    Args:
        export: writes a model as ONNX: (model, path).
        inputs: name of an input -> array, for networks.
        run: times an ONNX file somewhere else: path -> milliseconds; None times here.
        device: the name of that place.
        budget_s: least seconds for each layer.
    """

    def __init__(
        self,
        export: Callable[[Any, Path], None],
        inputs: Callable[[Any], dict[str, Any]],
        run: Callable[[Path], float] | None = None,
        device: str = "",
        budget_s: float = 0.02,
    ) -> None:
        self._export, self.feeds, self._run, self._budget = export, inputs, run, budget_s
        onnx = library("onnx", "onnx")
        self.versions = {"onnx": onnx.__version__}
        if run is None:
            runtime = library("onnxruntime", "onnx")
            self.runtime, self.device = "onnxruntime", device or _processor()
            self.versions["onnxruntime"] = runtime.__version__
        else:
            self.runtime, self.device = "command", device

    def layers(self, points: Sequence[Point]) -> list[float]:
        if not points:
            return []
        # What a call itself takes is not the layer's: that of a product of two numbers.
        nothing = {"op": "matmul", "m": 1, "inner": 1, "n": 1}
        call, *found = self._timed([(nothing, 1, 1), *points], self._budget)
        return [max(ms - call, 0.0) for ms in found]

    def networks(self, models: Sequence[Any]) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            made = [self.written(model, Path(folder) / f"{number}.onnx") for number, model in enumerate(models)]
            return self.of_files(made, self.feeds(models[0]))

    def written(self, model: Any, path: Path) -> Path:
        """Write a network as a file to be timed; returns its path."""
        self._export(model, path)
        return path

    def of_files(self, made: Sequence[Path], feeds: Mapping[str, Any]) -> list[float]:
        """Milliseconds of networks that were written, taken in turn.

        Args:
            made: ONNX files.
            feeds: name of an input -> array.
        """
        if self._run is not None:
            return [float(self._run(path)) for path in made]
        sessions = [_session(str(path)) for path in made]
        calls = [(s, {i.name: feeds[i.name] for i in s.get_inputs()}) for s in sessions]
        return _in_turn(calls, 20 * self._budget * len(calls))

    def _timed(self, points: Sequence[Point], budget_s: float) -> list[float]:
        found: list[float] = []
        bar = iter(progress(list(points), "layers"))
        for start in range(0, len(points), _TOGETHER):
            batch = [layer_file(*point) for point in points[start : start + _TOGETHER]]
            if self._run is not None:
                for content in batch:
                    with tempfile.TemporaryDirectory() as folder:
                        path = Path(folder) / "layer.onnx"
                        path.write_bytes(content)
                        found.append(float(self._run(path)))
            else:
                sessions = [_session(content) for content in batch]
                calls = [(s, {i.name: _numbers(i.shape) for i in s.get_inputs()}) for s in sessions]
                found += _in_turn(calls, budget_s * len(calls))
            for _ in batch:
                next(bar, None)
        next(bar, None)
        return found


class TimedCut:
    """A network's times before and after a cut, each written as a file, the two timed in turn.

    Args:
        times: what times.
        model: the network before the cut.
    """

    def __init__(self, times: OnnxTimes, model: Any) -> None:
        self._times, self._feeds = times, times.feeds(model)
        self._folder = tempfile.TemporaryDirectory()
        try:
            self._before = times.written(model, Path(self._folder.name) / "before.onnx")
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> TimedCut:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def ms(self, model: Any) -> tuple[float, float]:
        """Milliseconds (before, after).

        Args:
            model: the network after the cut.
        """
        after = self._times.written(model, Path(self._folder.name) / "after.onnx")
        before_ms, after_ms = self._times.of_files([self._before, after], self._feeds)
        return before_ms, after_ms


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _session(source: str | bytes) -> Any:
    runtime = library("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _in_turn(calls: Sequence[tuple[Any, dict[str, Any]]], budget_s: float) -> list[float]:
    """The fastest of each session's runs, by the thread's own clock."""
    rounds: list[list[float]] = []
    end = time.thread_time() + budget_s
    while len(rounds) < _LEAST_RUNS or (time.thread_time() < end and len(rounds) < _MOST_RUNS):
        rounds.append([])
        for session, feeds in calls:
            best = math.inf
            for _ in range(_BURST):
                began = time.thread_time()
                session.run(None, feeds)
                best = min(best, time.thread_time() - began)
            rounds[-1].append(1000 * best)
    return [min(column) for column in zip(*rounds[1:])]


def _numbers(shape: Sequence[int]) -> Any:
    return np.random.default_rng(0).standard_normal([int(n) for n in shape]).astype(np.float32)


def layer_file(spec: Mapping[str, Any], n_in: int, n_out: int) -> bytes:
    """An ONNX file of one layer of random weights.

    Args:
        spec: as a `TimedLayer` has it.
        n_in: width in; of a product of activations how many there are.
        n_out: width out.
    """
    onnx = library("onnx", "onnx")
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT

    def info(name: str, shape: Sequence[int]) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    def weight(shape: Sequence[int]) -> Any:
        return numpy_helper.from_array(_numbers(shape) * np.float32(0.01), "w")

    given, made, constants = ["x", "w"], "y", list[Any]()
    output: tuple[int, ...]
    if spec["op"] == "matmul":
        m, inner, n = spec["m"], spec["inner"], spec["n"]
        inputs, output = [info("x", (n_in, m, inner)), info("w", (n_in, inner, n))], (n_in, m, n)
        node = helper.make_node("MatMul", given, [made])
    elif spec["op"] == "linear":
        rows = spec["rows"]
        inputs, output, constants = [info("x", (rows, n_in))], (rows, n_out), [weight((n_in, n_out))]
        node = helper.make_node("MatMul", given, [made])
    else:
        groups = n_in // spec["in_a_group"] if spec["in_a_group"] else 1
        n_out = groups * spec["out_a_group"] if spec["in_a_group"] else n_out
        strides, pads, extra = _geometry(spec)
        turned = spec["transposed"]
        shape = (n_in, n_out // groups, *spec["kernel"]) if turned else (n_out, n_in // groups, *spec["kernel"])
        inputs, constants = [info("x", (spec["batch"], n_in, *spec["in"]))], [weight(shape)]
        output = (spec["batch"], n_out, *spec["out"])
        node = helper.make_node(
            "ConvTranspose" if turned else "Conv", given, [made],
            kernel_shape=spec["kernel"], strides=strides, pads=pads, group=groups, **extra,
        )  # fmt: skip
    graph = helper.make_graph([node], "layer", inputs, [info(made, output)], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = proto.SerializeToString()
    return content


def _geometry(spec: Mapping[str, Any]) -> tuple[list[int], list[int], dict[str, Any]]:
    """Strides and pads with which a convolution makes its output's size of its input's."""
    if spec["transposed"]:
        return [max(1, round(o / i)) for i, o in zip(spec["in"], spec["out"])], [0] * 2 * len(spec["in"]), {
            "output_shape": list(spec["out"])
        }  # fmt: skip
    strides, before, after = [], [], []
    for n, made, kernel in zip(spec["in"], spec["out"], spec["kernel"]):
        stride = max(1, round(n / made))
        missing = (made - 1) * stride + kernel - n
        if missing < 0:  # rows at the end that no window reaches
            missing = 0
            while (n - kernel) // stride + 1 > made:
                stride += 1
        strides.append(stride)
        before.append(missing // 2)
        after.append(missing - missing // 2)
    return strides, [*before, *after], {}
