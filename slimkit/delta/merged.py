"""While deltas are merged they do not train: whoever trains then is told, once."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta.merged import WATCH, MergedWatch
from slimkit.delta.attach import DeltaLayer

import torch
from torch import nn

__all__ = ["bridge", "forget", "watch"]


class _Watch(MergedWatch):
    """A forward pre-hook of merged layers."""

    def __call__(self, layer: Any, args: Any) -> None:
        if not self.told and layer.training and torch.is_grad_enabled() and layer.delta_is_merged:
            self.see(layer.named_parameters())


def watch(model: nn.Module) -> None:
    """Watch the merged layers of a model, in place."""
    forget(model)
    hook = _Watch()
    for module in model.modules():
        if isinstance(module, DeltaLayer) and module.delta_is_merged:
            vars(module)[WATCH] = module.register_forward_pre_hook(hook)


def forget(model: nn.Module) -> None:
    """Watch no longer, in place."""
    for module in model.modules():
        handle = vars(module).pop(WATCH, None)
        if handle is not None:
            handle.remove()
