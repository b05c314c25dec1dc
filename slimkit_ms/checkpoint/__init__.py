"""Checkpoints on MindSpore: saved by hand or while training, verified when loaded, with a report of what went where."""

from __future__ import annotations

from slimkit.core.checkpoint.loading import LoadReport
from slimkit.core.lazy import door as _door
from slimkit_ms.checkpoint.byhand import load_checkpoint, load_param_into_net, save_checkpoint
from slimkit_ms.checkpoint.trainable import TrainableParamsCheckPoint

from mindspore.train import CheckpointConfig

__all__ = [
    "CheckpointConfig",
    "LoadReport",
    "TrainableParamsCheckPoint",
    "load_checkpoint",
    "load_param_into_net",
    "save_checkpoint",
]

__getattr__, __dir__ = _door("slimkit_ms", room="checkpoint")
