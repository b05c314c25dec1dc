"""Checkpoints on PyTorch: saved by hand or while training, verified when loaded, with a report of what went where."""

from __future__ import annotations

from slimkit.checkpoint.byhand import load_checkpoint, load_param_into_net, save_checkpoint
from slimkit.checkpoint.trainable import TrainableParamsCheckPoint
from slimkit.core.checkpoint.loading import LoadReport
from slimkit.core.checkpoint.savepolicy import CheckpointConfig
from slimkit.core.lazy import door as _door

__all__ = [
    "CheckpointConfig",
    "LoadReport",
    "TrainableParamsCheckPoint",
    "load_checkpoint",
    "load_param_into_net",
    "save_checkpoint",
]

__getattr__, __dir__ = _door("slimkit", room="checkpoint")
