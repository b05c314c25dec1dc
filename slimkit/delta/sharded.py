"""Models that several processes share: which tensors last between runs, who writes, whose gradients are averaged."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core.delta.spec import PREFIX

import torch
from torch import nn

__all__ = ["at_rest", "bridge", "forget_deltas", "sharded_class", "share_gradients", "whole", "written_once"]


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


def _mesh_of(tensor: torch.Tensor) -> Any:
    """The devices that hold parts of a tensor; None for a whole one."""
    return getattr(tensor, "device_mesh", None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that several processes hold parts of, put together; all of them must ask."""
    return tensor if _mesh_of(tensor) is None else tensor.full_tensor()


def like_parts_of(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value as the processes hold the tensor: in parts, or whole."""
    if _mesh_of(tensor) is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    shared: Any = tensor
    return distribute_tensor(value.to(shared.device, shared.dtype), shared.device_mesh, shared.placements)


def share_gradients(layers: Iterable[nn.Module]) -> None:
    """Keep deltas alike in all processes, in place, where they came on layers that were sharded before.

    FSDP knows the parameters that were there when it sharded a module. Those that came later are whole in every
    process: they begin with the first one's values, and their gradients are averaged as soon as they are there.
    """
    for layer in layers:
        meshes = [mesh for p in layer.parameters() if (mesh := _mesh_of(p)) is not None]
        for name, parameter in layer.named_parameters() if meshes else ():
            if PREFIX not in name or _mesh_of(parameter) is not None or hasattr(parameter, "shared_by_processes"):
                continue
            groups = meshes[0].get_all_groups()
            for group in groups:
                torch.distributed.broadcast(parameter.data, group=group, group_src=0)
            parameter.shared_by_processes = True
            parameter.register_post_accumulate_grad_hook(lambda p, groups=groups: _average(p, groups))


def _average(parameter: torch.Tensor, groups: Iterable[Any]) -> None:
    for group in groups:
        torch.distributed.all_reduce(parameter.grad, group=group)
        parameter.grad /= group.size()  # gloo has no average of its own


@contextlib.contextmanager
def written_once(model: nn.Module, directory: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Where a process writes what it saves: of those that share a model the first one alone writes for good.

    The others put their shares of the tensors together with it, and write into a folder that is thrown away. They go on
    when the files are there, and raise what went wrong.

    Args:
        model: as it was given, with what is wrapped around it.
        directory: where the files shall be.
    """
    distributed = torch.distributed
    split = any(_mesh_of(p) is not None for p in model.parameters())
    replicated = isinstance(model, nn.parallel.DistributedDataParallel)
    if not (split or replicated) or not (distributed.is_available() and distributed.is_initialized()):
        yield directory
        return
    first = distributed.get_rank() == 0
    if replicated and not split:
        # Every process holds all of it, and a script may well save in the first one alone: nobody waits.
        with contextlib.nullcontext(directory) if first else tempfile.TemporaryDirectory() as place:
            yield place
        return
    wrong: list[str | None] = [None]
    with tempfile.TemporaryDirectory() as spare:
        try:
            yield directory if first else Path(spare, "delta")
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
            raise
        finally:
            distributed.broadcast_object_list(wrong, src=0)
    if wrong[0] is not None:
        raise OSError(f"the first process could not save the delta: {wrong[0]}")
