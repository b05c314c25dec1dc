"""An optimizer's state in a checkpoint: written beside the parameters, checked against the optimizer, put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimkit.core import check
from slimkit.core.checkpoint import loading
from slimkit.core.checkpoint.loading import values_of
from slimkit.core.checkpoint.saving import Items
from slimkit.core.checkpoint.weightfile import Weights
from slimkit.core.errors import PlanError
from slimkit.sharded import at_rest, is_distributed, like_parts_of, whole
from slimkit.torchfile import described, restored

import torch

# An optimizer's state lies under OPTIMIZER + "state.<parameter>.<slot>" and OPTIMIZER + "group.<number>.<key>".
OPTIMIZER = loading.OPTIMIZER


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside data-parallel and compiled ones."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = getattr(model, "module", None) or model._orig_mod
    return model


def _held_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A moment where its parameter is: whole, or the part of it that this process holds."""
    if not is_distributed(parameter):
        return value.to(parameter.device)
    return like_parts_of(torch.empty_like(parameter, dtype=value.dtype), value).clone()


def add_optimizer(items: Items, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Add an optimizer's moments and settings to what a checkpoint holds, in place."""
    check.instance(optimizer, torch.optim.Optimizer, "optimizer", "the optimizer, as optimizer_state=True asks")
    assert optimizer is not None
    at_rest(model)
    names = {id(p): n for n, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, (bool, int, float, str)):
                items.add_value(f"{OPTIMIZER}group.{number}.{key}", value)
        for parameter in group["params"]:
            for slot, value in optimizer.state.get(parameter, {}).items():
                name = f"{OPTIMIZER}state.{names.get(id(parameter), '?')}.{slot}"
                if isinstance(value, torch.Tensor):
                    items.add(name, *described(name, whole(value)))


def plan_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, source: Weights) -> Callable[[], None]:
    """Check an optimizer's state in a checkpoint against the optimizer; returns what puts it there, in place."""
    at_rest(model)
    parameters = dict(unwrapped(model).named_parameters())
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    slots: list[tuple[torch.nn.Parameter, str, str]] = []
    for name, entry in source.entries.items():
        if not name.startswith(OPTIMIZER + "state."):
            continue
        path, _, slot = name[len(OPTIMIZER) + 6 :].rpartition(".")
        parameter = parameters.get(path)
        if parameter is None or id(parameter) not in own:
            raise PlanError(f"{name!r}: the optimizer has no parameter {path!r}.")
        if entry.shape not in ((), (1,), tuple(parameter.shape)):
            raise PlanError(f"{name!r} has shape {list(entry.shape)}, its parameter has {list(parameter.shape)}.")
        slots.append((parameter, slot, name))
    if not slots:
        raise PlanError(f"{source.path} holds no optimizer state; it was saved without optimizer_state=True.")
    settings: list[tuple[dict[str, Any], str, Any]] = []
    for name, value in values_of(source).items():
        if name.startswith(OPTIMIZER + "group."):
            number, _, key = name[len(OPTIMIZER) + 6 :].partition(".")
            if not number.isdigit() or int(number) >= len(optimizer.param_groups):
                raise PlanError(f"{name!r}: the optimizer has {len(optimizer.param_groups)} parameter groups.")
            settings.append((optimizer.param_groups[int(number)], key, value))

    def restore() -> None:
        for parameter, slot, name in slots:
            value = restored(source.raw(name), source.entries[name].dtype).clone()
            # A step count stays on the CPU in its own type; moments live where the parameter does.
            moment = value.shape == parameter.shape
            optimizer.state[parameter][slot] = _held_like(parameter, value) if moment else value
        for group, key, value in settings:
            group[key] = value

    return restore
