"""Models under FSDP2 (`fully_shard`): which tensors last between runs, and what is sharded no longer."""

from __future__ import annotations

import sys
from typing import Any

from slimkit import bridge
from slimkit.core.delta.spec import PREFIX

from torch import nn

__all__ = ["at_rest", "bridge", "forget_deltas", "sharded_class"]


def sharded_class() -> Any:
    """The class of modules under FSDP2; None where it is not in use: importing it only to ask takes long."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return None if fsdp is None else fsdp.FSDPModule


def _sharded(model: nn.Module) -> list[Any]:
    kind = sharded_class()
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def at_rest(model: nn.Module) -> None:
    """Let modules hold their shards, in place: after a run some hold gathered copies, where writing is lost."""
    for module in _sharded(model):
        module.reshard()


def forget_deltas(model: nn.Module) -> None:
    """Let FSDP gather and scatter no parameter of a delta that was taken off, in place."""
    for module in _sharded(model):
        # No public call takes a parameter out of a group; the list is read anew at every step of a run.
        state = module._get_fsdp_state()
        for group in state._fsdp_param_groups:
            group.fsdp_params[:] = [p for p in group.fsdp_params if not _is_gone(p._module_info)]


def _is_gone(info: Any) -> bool:
    return PREFIX in info.param_name and info.param_name not in info.module._parameters
