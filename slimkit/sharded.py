"""Models under FSDP2 (`fully_shard`): which tensors last between runs, and what is sharded no longer."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from slimkit import bridge, together
from slimkit.bridge import is_distributed, is_managed
from slimkit.core.delta.spec import PREFIX
from slimkit.core.errors import ProcessLostError

import torch
from torch import nn

__all__ = [
    "at_rest",
    "beside",
    "bridge",
    "forget_deltas",
    "gathered_for",
    "in_step",
    "is_distributed",
    "is_in_step",
    "is_managed",
    "like_parts_of",
    "meshes_of",
    "one_writes",
    "own_part",
    "sharded_class",
    "whole",
    "written_once",
]


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


def meshes_of(model: nn.Module) -> dict[int, Any]:
    """id of each parameter that FSDP shares out -> the processes among which it does."""
    groups = (g for module in _sharded(model) for g in module._get_fsdp_state()._fsdp_param_groups)
    return {id(p.sharded_param): g.mesh_info.mesh for g in groups for p in g.fsdp_params}


def gathered_for(model: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Let a tensor that was taken out of the middle of a model begin a backward pass, in place.

    FSDP gathers a module's weights when the gradient of the module's output comes, and here none may come.

    Args:
        model: as it was called.
        path: the module that the tensor belongs to.
        tensor: what needs a gradient.
    """
    kind = sharded_class()
    if kind is None:
        return
    around: nn.Module | None = bridge.unwrapped(model)
    for name in (*path.split("."), ""):
        if isinstance(around, kind):
            tensor.register_hook(around._get_fsdp_state()._pre_backward)
        around = around._modules.get(name) if around is not None else None
        around = None if around is None else bridge.unwrapped(around)


def in_step(weight: Any, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Keep parameters that come to a sharded layer the same in every process, in place.

    FSDP does not know of them: they start with the first process's values, and their gradients are averaged.

    Returns:
        What ends the averaging: objects with `remove()`.
    """
    if not is_distributed(weight):
        return []
    handles = []
    for parameter in parameters:
        for group in weight.device_mesh.get_all_groups():
            torch.distributed.broadcast(parameter.data, group=group, group_src=0)
        average = functools.partial(_average, weight.device_mesh)
        handles.append(parameter.register_post_accumulate_grad_hook(average))
    return handles


def is_in_step(parameter: Any) -> bool:
    """Whether `in_step` averages a parameter's gradient."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(getattr(hook, "func", None) is _average for hook in hooks.values())


def _average(mesh: Any, parameter: torch.Tensor) -> None:
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(parameter.grad, group=group)
    parameter.grad /= mesh.size()


def whole(tensor: Any) -> torch.Tensor:
    """A tensor with all of its values, gathered where it is distributed.

    Raises:
        ProcessLostError: another process has ended, or failed while all save.
    """
    gathered: torch.Tensor = tensor
    if is_distributed(tensor):
        failed = [(n, wrong) for n, wrong in enumerate(together.step()) if wrong is not None]
        if failed:
            raise _OtherFailedError(*failed[0])
        with together.exchanging():
            gathered = tensor.full_tensor()
    return gathered


class _OtherFailedError(ProcessLostError):
    """Another process, by its number, has said what went wrong in it."""

    def __init__(self, number: int, wrong: str) -> None:
        super().__init__(f"process {number} of this job has failed, and this one ends with it: {wrong}")
        self.number, self.wrong = number, wrong


def own_part(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor, in the tensor's own memory."""
    part: torch.Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part


def beside(value: torch.Tensor, base: Any) -> torch.Tensor:
    """A value that is the same in every process as a tensor that computes with a distributed one."""
    if not is_distributed(base) or is_distributed(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, base.device_mesh, [Replicate()] * base.device_mesh.ndim, run_check=False)


def like_parts_of(tensor: Any, value: torch.Tensor) -> torch.Tensor:
    """A whole value as the processes hold the tensor: in parts, or whole."""
    if not is_distributed(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole value: each cuts its own part out, and none waits for another.
    whole_value = value.to(tensor.device, tensor.dtype)
    return distribute_tensor(whole_value, tensor.device_mesh, tensor.placements, src_data_rank=None)


@contextlib.contextmanager
def one_writes(what: str, at_end: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Save what processes hold together: gives whether this one writes, and ends in all when it has written.

    Args:
        what: how a message calls it.
        at_end: called in every process: takes part in what is left to put together.

    Raises:
        OSError: in the other processes, what went wrong in the first one.
        ProcessLostError: another process has failed, or ended.
    """
    first: str | None = None
    with together.keeping_step():
        try:
            yield together.rank() == 0
            at_end()
            first = together.step()[0]
        except _OtherFailedError as error:
            if error.number > 0:
                raise
            first = error.wrong
        except ProcessLostError:
            raise
        except Exception as error:
            with contextlib.suppress(ProcessLostError):  # this is what went wrong first
                together.step(f"{type(error).__name__}: {error}")
            raise
    if first is not None:
        raise OSError(f"the first process could not save {what}: {first}")


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
    at_rest(model)  # gathered copies look like whole parameters
    split = any(map(is_distributed, model.parameters()))
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
    with tempfile.TemporaryDirectory() as spare, one_writes("the delta"):
        yield directory if first else Path(spare, "delta")
