"""What the stages of a recipe ask of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import slimkit
from slimkit import bridge, export, train
from slimkit.core import check
from slimkit.core.run import recipe
from slimkit.core.run.measurement import Measurement
from slimkit.core.run.stages import ComputeLoss, Stages
from slimkit.measurement import measure_model

import torch
from torch import nn


class TorchWing(Stages):
    """PyTorch's answers to the runner of recipes (`slimkit.core.run.pipeline.Wing`)."""

    slim = slimkit

    def seed_framework(self, seed: int) -> None:
        torch.manual_seed(seed)

    def framework_versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def check_model(self, model: Any) -> nn.Module:
        return bridge.check_model(model, "model")

    def measure(self, model: nn.Module, example: Any) -> Measurement:
        return measure_model(model, example)

    def states(self, model: nn.Module) -> Iterator[tuple[str, str, np.ndarray]]:
        for name, tensor in model.state_dict().items():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield name, f"{tensor.dtype}{tuple(tensor.shape)}", raw

    def sizes(self, model: nn.Module) -> list[tuple[int, bool]]:
        return [(p.numel(), p.requires_grad) for p in model.parameters()]

    def snapshot(self, model: nn.Module) -> Callable[[nn.Module], Any]:
        kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return lambda fresh: fresh.load_state_dict(kept)

    def outputs(self, model: nn.Module, example: Any) -> list[np.ndarray]:
        with bridge.evaluating(model):
            found = export.named_tensors(bridge.run(model, example))
        return [tensor.detach().cpu().numpy() for _, tensor in found]

    def fit(self, model: nn.Module, options: recipe.Training, train_data: Any, loss: ComputeLoss) -> Any:
        wanted = [p for p in model.parameters() if p.requires_grad]
        rate, decay = options.learning_rate, options.weight_decay
        if options.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(wanted, lr=rate, momentum=0.9, weight_decay=decay)
        else:
            optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=decay)
        return train.Trainer(model, optimizer=optimizer, compute_loss=loss).train(
            train_data,
            num_epochs=options.epochs,
            per_device_batch_size=options.batch_size,
            gradient_clip_value=options.gradient_clip,
            create_scheduler_fn=_schedule(options.schedule),
        )

    @contextlib.contextmanager
    def statistics_held(self, model: nn.Module) -> Iterator[None]:
        modes = {module: module.training for module in model.modules()}
        model.train()
        for module in modes:
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def named_loss(self, name: str) -> ComputeLoss | None:
        named = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}
        if name not in named:
            return None
        return lambda model, batch: named[name](bridge.run(model, batch[0]), batch[1])

    def soft_loss(self, dual: nn.Module, batch: Any) -> torch.Tensor:
        return bridge.run(dual, batch)[0]

    def arrays(self, example: Any) -> list[np.ndarray]:
        return list(export.example_arrays(example).values())


def _schedule(name: str) -> Callable[..., Any] | None:
    """A scheduler factory: optimizer and number of updates in, scheduler out."""
    from torch.optim import lr_scheduler

    makers: dict[str, Callable[..., Any] | None] = {
        "constant": None,
        "cosine": lr_scheduler.CosineAnnealingLR,
        "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
    }
    return makers[check.choice(name, makers, "schedule")]
