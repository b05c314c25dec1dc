"""What the stages of a recipe ask of MindSpore."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import slimkit_ms
from slimkit.core.batch import as_call
from slimkit.core.run import recipe
from slimkit.core.run.measurement import Measurement
from slimkit.core.run.stages import ComputeLoss, Stages
from slimkit.core.train.schedules import cosine_schedule, linear_schedule
from slimkit_ms import bridge, export, kinds, train
from slimkit_ms.measurement import measure_model

import mindspore as ms
from mindspore import nn, ops


class MindSporeWing(Stages):
    """MindSpore's answers to the runner of recipes (`slimkit.core.run.pipeline.Wing`)."""

    slim = slimkit_ms
    formats = ("onnx", "mindir")

    def __init__(self) -> None:
        if ms.get_context("device_target") == "CPU":
            # The stages run operator by operator; on a CPU, waiting for each is ten times as fast as queueing them.
            ms.runtime.launch_blocking()

    def seed_framework(self, seed: int) -> None:
        ms.set_seed(seed)

    def framework_versions(self) -> dict[str, str]:
        return {"mindspore": ms.__version__}

    def check_model(self, model: Any) -> nn.Cell:
        return bridge.check_model(model, "model")

    def measure(self, model: nn.Cell, example: Any) -> Measurement:
        return measure_model(model, example)

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

    def outputs(self, model: nn.Cell, example: Any) -> list[np.ndarray]:
        with bridge.evaluating(model):
            return list(export.outputs(bridge.run(model, example)).values())

    def fit(self, model: nn.Cell, options: recipe.Training, train_data: Any, loss: ComputeLoss) -> Any:
        wanted = model.trainable_params()
        rate, decay = options.learning_rate, options.weight_decay
        if options.optimizer == "sgd":
            optimizer: Any = nn.Momentum(wanted, rate, 0.9, weight_decay=decay)
        else:
            optimizer = ms.experimental.optim.AdamW(wanted, lr=rate, weight_decay=decay)
        with bridge.pynative():
            return train.Trainer(model, optimizer=optimizer, compute_loss=loss).train(
                train_data,
                num_epochs=options.epochs,
                per_device_batch_size=options.batch_size,
                gradient_clip_value=options.gradient_clip,
                create_scheduler_fn={"constant": None, "cosine": cosine_schedule(), "linear": linear_schedule()}[
                    options.schedule
                ],
            )

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

    def named_loss(self, name: str) -> ComputeLoss | None:
        named = {"cross_entropy": ops.cross_entropy, "mse": ops.mse_loss}
        if name not in named:
            return None
        return lambda model, batch: named[name](bridge.run(model, batch[0]), batch[1])

    def soft_loss(self, dual: nn.Cell, batch: Any) -> ms.Tensor:
        return bridge.run(dual, batch)

    def arrays(self, example: Any) -> list[np.ndarray]:
        return [bridge.as_numpy(tensor) for tensor in as_call(example)[0]]
