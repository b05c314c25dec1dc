"""R-Drop as the loss of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core.batch import tensors_in
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.framework import ComputeLoss, JobFramework


def loss_of(face: JobFramework, name: str, weight: float) -> ComputeLoss:
    """f(model, (inputs, classes)): every sample twice through dropout in one batch, and R-Drop's loss of the pairs."""
    if name not in ("cross_entropy", "classification"):
        raise ConfigError(f"rdrop compares the classes of cross_entropy. The loss is {name}")
    criterion = face.slim.RDropLoss()

    def double(inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return {key: double(value) for key, value in inputs.items()}
        if isinstance(inputs, (tuple, list)):
            return [double(value) for value in inputs]
        return face.slim.rdrop_repeat(inputs)[0]

    def loss(model: Any, batch: Any) -> Any:
        answer = next(iter(tensors_in(face.call(model, double(batch[0])))))
        if len(answer.shape) != 2:
            raise ConfigError(f"rdrop wants answers of (samples, classes). Received: {tuple(answer.shape)}")
        return criterion(answer, double(batch[1]), weight)

    return loss
