"""What the jobs ask of MindSpore."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import slimkit_ms
from slimkit.core import files
from slimkit.core.checkpoint.maker import write_maker
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.device import parse_device
from slimkit.core.jobs.framework import ComputeLoss, JobFramework, Opened
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.jobs.options import FitOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace
from slimkit.core.prune.onnx_times import OnnxTimes
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit_ms import bridge, compare, export, kinds, latency, train
from slimkit_ms.distill import taps
from slimkit_ms.measurement import measure_model
from slimkit_ms.sparse.framework import MindSporeSparse
from slimkit_ms.trace.examples import find_example

import mindspore as ms
from mindspore import nn, ops

# The file of a model without a plan; MindSpore's own format, which its tools read.
_WEIGHTS = "model.ckpt"


class MindSporeJobs(JobFramework):
    """MindSpore's side of the jobs: cells from factories, with checkpoints or the commands' own folders."""

    slim = slimkit_ms
    formats = ("onnx", "w16a16s", "w8a8s", "mindir")
    class_dtype = "int32"
    losses: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {
        "cross_entropy": ops.cross_entropy,
        "mse": ops.mse_loss,
    }

    def __init__(self, device: str | None = None) -> None:
        if device is not None:
            _set_device(device)
        if ms.get_context("device_target") == "CPU":
            # The jobs run operator by operator; on a CPU, waiting for each is ten times as fast as queueing them.
            ms.runtime.launch_blocking()

    # Random numbers and versions.

    def seed_framework(self, seed: int) -> None:
        ms.set_seed(seed)

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        np.random.seed(seed % 2**32)
        ms.set_seed(seed)
        yield

    def framework_versions(self) -> dict[str, str]:
        return {"mindspore": ms.__version__}

    # A model in memory.

    def check_model(self, model: Any) -> nn.Cell:
        return bridge.check_model(model, "model")

    def measure(self, model: nn.Cell, inputs: Any, dense: nn.Cell | None = None) -> Measurement:
        return measure_model(model, _positional(model, inputs), dense=dense)

    def latency_times(self, model: nn.Cell, inputs: Any) -> OnnxTimes:
        return latency.onnx_times(_positional(model, inputs))

    def states(self, model: nn.Cell) -> Iterator[tuple[str, str, np.ndarray]]:
        for parameter, paths in bridge.parameter_paths(model):
            yield paths[0], f"{parameter.dtype}{tuple(parameter.shape)}", bridge.as_numpy(parameter).reshape(-1)

    def sizes(self, model: nn.Cell) -> list[tuple[int, bool]]:
        return [
            (p.size, p.requires_grad) for p, paths in bridge.parameter_paths(model) if bridge.is_weight(p, paths[0])
        ]

    def snapshot(self, model: nn.Cell) -> Callable[[nn.Cell], Any]:
        kept = {paths[0]: bridge.as_numpy(p) for p, paths in bridge.parameter_paths(model)}

        def put_back(fresh: nn.Cell) -> None:
            for parameter, paths in bridge.parameter_paths(fresh):
                ops.assign(parameter, ms.Tensor(kept[paths[0]], parameter.dtype))

        return put_back

    def record_zeros(self, model: nn.Cell, names: Iterable[str]) -> None:
        bridge.record_zeros_of(model, names)

    def made_zeros(self, model: nn.Cell) -> bool:
        return any(bridge.has_made_zeros(part) for part in (cell for _, cell in model.cells_and_names()))

    def call(self, model: nn.Cell, inputs: Any) -> Any:
        return bridge.run(model, inputs)

    def outputs(self, model: nn.Cell, inputs: Any) -> list[np.ndarray]:
        with bridge.evaluating(model):
            return list(export.outputs(bridge.run(model, inputs)).values())

    def inside(self, model: nn.Cell, inputs: Any, paths: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        cells = {path: taps.find(model, path, "t_module") for path in paths}
        hooks = bridge.hooked(cells, lambda path, _inputs, it: found.update({path: it}))
        with bridge.pynative(), bridge.evaluating(model), hooks:
            return {"": bridge.run(model, inputs), **found}

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        return [bridge.as_numpy(tensor) for tensor in _positional(None, inputs)]

    @contextlib.contextmanager
    def evaluating(self, model: nn.Cell) -> Iterator[None]:
        with bridge.pynative(), bridge.evaluating(model):
            yield

    def sparse_layers(self, model: nn.Cell) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        return MindSporeSparse(model).layers()

    # Training.

    def train(
        self,
        model: nn.Cell,
        samples: Any,
        options: FitOptions,
        loss: ComputeLoss,
        callbacks: list[Any],
        how: Mapping[str, Any],
        tokens: Callable[[Any], float] | None = None,
    ) -> train.Trainer:
        wanted = model.trainable_params()
        rate, decay = options.learning_rate, options.weight_decay
        if options.optimizer == "sgd":
            optimizer: Any = nn.Momentum(wanted, rate, 0.9, weight_decay=decay)
        else:
            optimizer = ms.experimental.optim.AdamW(wanted, lr=rate, weight_decay=decay)
        trainer = train.Trainer(model, optimizer=optimizer, compute_loss=loss, callbacks=callbacks, count_tokens=tokens)
        with bridge.pynative():
            trainer.train(samples, **how)
        return trainer

    @contextlib.contextmanager
    def statistics_held(self, model: nn.Cell) -> Iterator[None]:
        modes = [(cell, cell.training) for _, cell in model.cells_and_names()]
        model.set_train(True)
        for cell, _ in modes:
            if any(key in cell._params for key in kinds.STATISTICS):
                cell.set_train(False)
        try:
            yield
        finally:
            for cell, mode in modes:
                cell.training = mode

    def soft_loss(self, dual: nn.Cell, inputs: Any) -> ms.Tensor:
        return bridge.run(dual, inputs)

    def keeps_answers(self) -> bool:
        return bool(ms.get_context("mode") == ms.PYNATIVE_MODE)

    def judging(self) -> compare.MindSporeCompare:
        return compare.MindSporeCompare()

    # What a command line names, and what it writes.

    def open(self, place: ModelPlace, delta: Path | None = None) -> Opened:
        if place.factory is None:
            raise ConfigError(
                "--framework mindspore needs --factory MODULE:FUNCTION: a checkpoint does not say which cell it is of, "
                "and MindSpore cannot build models of transformers"
            )
        model = bridge.check_model(place.make(), "the model that --factory returns")
        bridge.rename_parameters(model)
        desc = None
        if place.model is not None and (place.model / folders.PLAN).exists():
            desc = files.read_json(place.model / folders.PLAN)
            self.slim.load_pruned(place.model, model)
        elif place.model is not None:
            self.slim.load_checkpoint(place.model, model, strict_load=True)
        if place.model is not None:
            bridge.record_zeros_of(model, folders.made_sparse(place.model))
        if delta is not None:
            self.slim.load_delta(model, delta)
        model.set_train(False)
        return Opened(model, place, desc=desc)

    def tensors(self, arrays: Any) -> Any:
        if isinstance(arrays, dict):
            return {k: self.tensors(v) for k, v in arrays.items()}
        return ms.Tensor(np.ascontiguousarray(arrays))

    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        return find_example(opened.model)[0].inputs

    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        raise ConfigError("--calib: text needs the tokenizer of a Hugging Face directory; give arrays or a function")

    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        return {f"input_{at}": list(tensor.shape) for at, tensor in enumerate(_positional(None, inputs))}

    def write_model(self, opened: Opened, folder: Path) -> str:
        if opened.desc is not None:
            self.slim.save_pruned(folder, opened.model, opened.desc)
        else:
            self.slim.save_checkpoint(opened.model, folder / _WEIGHTS)
        assert opened.place.factory is not None
        write_maker(folder, opened.place.factory, opened.place.arguments)
        return "weights" if opened.desc is None else "slimkit"

    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        if format == "w16a16s":
            return self.slim.save_w16a16s(out, opened.model, opened.place.model).to_dict()
        if format == "w8a8s":
            return self.slim.save_w8a8s(out, opened.model, inputs, opened.place.model, **settings).to_dict()
        given = _positional(opened.model, inputs)
        if format == "mindir":
            return self.slim.export_mindir(opened.model, given, out, tolerance=settings["tolerance"]).to_dict()
        return self.slim.export_onnx(opened.model, given, out, **settings).to_dict()


def _set_device(name: str) -> None:
    """Compute on the device that a command line names, in MindSpore's words."""
    kind, number = parse_device(name)
    target = {"cpu": "CPU", "cuda": "GPU", "npu": "Ascend"}[kind]
    try:
        if kind == "cpu":
            ms.set_device(target)
        else:
            ms.set_device(target, number)
        ms.Tensor(np.ones(1, np.float32)) + 1  # a device that is not there is refused at its first use
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--device {name}: MindSpore finds no {target} device here: {reason}") from None


def _positional(model: nn.Cell | None, inputs: Any) -> tuple[Any, ...]:
    """An example as the tuple of tensors that a cell's construct takes, in the order of its arguments."""
    if isinstance(inputs, dict):
        names = [] if model is None else [n for n in inspect.signature(model.construct).parameters if n in inputs]
        return tuple(inputs[n] for n in names) if len(names) == len(inputs) else tuple(inputs.values())
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
