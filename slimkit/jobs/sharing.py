"""A command's model among the processes of its command: each holds a part (FSDP2), and the first gets the whole."""

from __future__ import annotations

import copy
from typing import Any

from slimkit import bridge  # noqa: F401  (says in one line that torch is missing)
from slimkit.chain import stack_of
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.sharded import at_rest, whole

import torch
from torch import distributed, nn


class SharedOut:
    """A model of which each process holds a part from here on, in place.

    Every process begins with the values of the first one. Blocks are gathered one by one while the model runs.

    Args:
        model: whole, and the same in every process.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = model
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), src=0)
        self._hollow = _hollow(model)
        try:
            blocks = stack_of(model)
        except ArgumentError:  # a network of another form is gathered as one
            blocks = []
        for path in blocks:
            fully_shard(model.get_submodule(path))
        fully_shard(model, reshard_after_forward=True)

    def whole(self) -> nn.Module | None:
        """The model as one process has it, on the CPU, in the first process; None in the others. All of them call."""
        at_rest(self.model)
        found, first = self.model.state_dict(), distributed.get_rank() == 0
        made: dict[int, Any] = {}
        for path, module in self._hollow.named_modules():
            for own in (module._parameters, module._buffers):
                for key, empty in own.items():
                    if empty is None or not empty.is_meta or id(empty) in made:
                        continue
                    name = f"{path}.{key}" if path else key
                    if name not in found:
                        raise FileFormatError(f"the trained model has no tensor {name!r}, which it had before")
                    value = whole(found[name].detach())
                    made[id(empty)] = value.cpu() if first else None
        # What no state holds (rotary tables) has stayed on the device.
        return _filled(self._hollow, made).cpu().eval() if first else None


def _hollow(model: nn.Module) -> nn.Module:
    """A copy that holds no tensor of the model's state, only their shapes."""
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in kept:
            empty = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _filled(hollow: nn.Module, made: dict[int, Any]) -> nn.Module:
    """Put values in the places of shapes, in place; what shares a tensor goes on sharing it."""
    parameters: dict[int, nn.Parameter] = {}
    for module in hollow.modules():
        for key, empty in module._parameters.items():
            if empty is not None and empty.is_meta:
                fresh = nn.Parameter(made[id(empty)], empty.requires_grad)
                module._parameters[key] = parameters.setdefault(id(empty), fresh)
        for key, empty in module._buffers.items():
            if empty is not None and empty.is_meta:
                module._buffers[key] = made[id(empty)]
    return hollow
