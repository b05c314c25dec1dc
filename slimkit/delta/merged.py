"""While deltas are merged they do not train: whoever trains then is told, once."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta.spec import PREFIX
from slimkit.core.log import logger
from slimkit.delta.attach import DeltaLayer

import torch
from torch import nn

__all__ = ["bridge", "forget", "watch"]

_WATCH = "watch_while_merged"


class _Watch:
    """A forward pre-hook of merged layers; a class, so that models with it can be copied and pickled."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, layer: Any, args: Any) -> None:
        if self.told or not (layer.training and torch.is_grad_enabled() and layer.delta_is_merged):
            return
        if any(p.requires_grad for n, p in layer.named_parameters() if PREFIX in n):
            self.told = True
            logger.warning("the deltas are merged and do not train: call unmerge_delta before training goes on")


def watch(model: nn.Module) -> None:
    """Watch the merged layers of a model, in place."""
    forget(model)
    hook = _Watch()
    for module in model.modules():
        if isinstance(module, DeltaLayer) and module.delta_is_merged:
            vars(module)[_WATCH] = module.register_forward_pre_hook(hook)


def forget(model: nn.Module) -> None:
    """Watch no longer, in place."""
    for module in model.modules():
        handle = vars(module).pop(_WATCH, None)
        if handle is not None:
            handle.remove()
