"""What the single commands ask of MindSpore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import slimkit_ms
from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.jobs.device import parse_device
from slimkit.core.jobs.training import TrainingPlan
from slimkit.core.jobs.wing import Jobs, Opened
from slimkit.core.run.measurement import Measurement
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit_ms import bridge, train
from slimkit_ms.measurement import measure_model
from slimkit_ms.sparse.framework import MindSporeSparse
from slimkit_ms.stages import MindSporeWing

import mindspore as ms
from mindspore import nn

# The file of a model without a plan; MindSpore's own format, which its tools read.
_WEIGHTS = "model.ckpt"


class MindSporeJobs(Jobs):
    """MindSpore's side of the commands: cells from factories, with checkpoints or the commands' own folders."""

    slim = slimkit_ms
    formats = ("onnx", "mindir")
    class_dtype = "int32"

    def __init__(self, device: str | None = None) -> None:
        if device is not None:
            _set_device(device)
        self.stages = MindSporeWing()

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
            own = place.model / _WEIGHTS
            self.slim.load_checkpoint(own if own.exists() else place.model, model, strict_load=True)
        if delta is not None:
            self.slim.load_delta(model, delta)
        model.set_train(False)
        return Opened(model, place, desc=desc)

    def tensors(self, arrays: Any) -> Any:
        if isinstance(arrays, dict):
            return {k: self.tensors(v) for k, v in arrays.items()}
        return ms.Tensor(np.ascontiguousarray(arrays))

    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        return None

    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        raise ConfigError("--calib: text needs the tokenizer of a Hugging Face directory; give arrays or a function")

    def write_model(self, opened: Opened, folder: Path) -> str:
        if opened.desc is not None:
            self.slim.save_pruned(folder, opened.model, opened.desc)
            return "slimkit"
        self.slim.save_checkpoint(opened.model, folder / _WEIGHTS)
        return "weights"

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        self.stages.seed(seed)
        yield

    @contextlib.contextmanager
    def evaluating(self, model: nn.Cell) -> Iterator[None]:
        with bridge.pynative(), bridge.evaluating(model):
            yield

    def train(
        self,
        model: nn.Cell,
        samples: Any,
        plan: TrainingPlan,
        loss: Callable[[Any, Any], Any],
        callbacks: list[Any],
        how: Mapping[str, Any],
    ) -> train.Trainer:
        wanted = model.trainable_params()
        optimizer = ms.experimental.optim.AdamW(wanted, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        trainer = train.Trainer(model, optimizer=optimizer, compute_loss=loss, callbacks=callbacks)
        with bridge.pynative():
            trainer.train(samples, **how)
        return trainer

    def parameters(self, model: nn.Cell) -> int:
        return sum(p.size for p, paths in bridge.parameter_paths(model) if bridge.is_weight(p, paths[0]))

    def layers(self, model: nn.Cell) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        return MindSporeSparse(model).layers()

    def figures(self, model: nn.Cell, inputs: Any) -> Measurement:
        return measure_model(model, _positional(inputs))

    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        return {f"input_{at}": list(tensor.shape) for at, tensor in enumerate(_positional(inputs))}

    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = _positional(inputs)
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


def _positional(inputs: Any) -> tuple[Any, ...]:
    """An example as the tuple of tensors that a cell's construct takes."""
    if isinstance(inputs, dict):
        return tuple(inputs.values())
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
