"""Optimizers of torch models that were pruned: their moments follow the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit import bridge, surgery
from slimkit.core import check
from slimkit.core.errors import ArgumentError
from slimkit.core.lazy import door
from slimkit.core.prune.optimizer_state import Axes, OptimizerReport, state_axes
from slimkit.core.prune.plan import PrunePlan

import torch

__getattr__, __dir__ = door("slimkit", room="prune")


def migrate_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, desc: dict[str, Any]
) -> OptimizerReport:
    """Cut an optimizer's state by the plan that cut its model, in place, so that training goes on where it was.

    Parameters of a torch model stay the same objects, so that schedulers, gradient scalers and the optimizer itself go
    on meaning them; only moments and other states of the old shapes are cut. Call it once after each cut; a state that
    was cut already is left alone.

    Args:
        optimizer: any torch optimizer whose states have their parameters' shapes, are scalars, or lack one axis.
        model: the pruned model.
        desc: the plan that pruned it; after several cuts `merge_desc(first, second)`.

    Returns:
        What was cut, kept and restarted. LBFGS restarts: its history measures the curvature of one fixed function.

    Raises:
        ArgumentError: the optimizer holds no parameter of the model.
        PlanError: the model is not the one that desc pruned, or a state has an unknown shape; nothing was changed.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 8)).sum().backward(); adam.step()
        >>> from slimkit import PruneTorch
        >>> desc = PruneTorch(net, torch.ones(1, 8)).prune(0.5, [])
        >>> report = migrate_optimizer(adam, net, desc)
        >>> adam.state[net[0].weight]["exp_avg"].shape == net[0].weight.shape
        True
    """
    check.instance(optimizer, torch.optim.Optimizer, "optimizer", "a torch.optim.Optimizer")
    plan = PrunePlan(desc)
    found = surgery.tensors(bridge.uncompiled(bridge.check_model(model)))
    names = plan.match_cut({path: tuple(t.shape) for path, t in found.items()})
    paths = {id(tensor): path for path, tensor in found.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    report = OptimizerReport(elsewhere=sum(id(p) not in paths for p in held))
    if held and report.elsewhere == len(held):
        raise ArgumentError("optimizer must hold parameters of the model. Received: one that holds none of them")
    if isinstance(optimizer, torch.optim.LBFGS):
        return _restart(optimizer, report)
    cuts = {names[path]: (plan.shapes[path], axes) for path, axes in plan.indices.items()}
    new: list[tuple[dict[str, Any], str, Any]] = []
    for parameter in held:
        path = paths.get(id(parameter))
        if path is None:
            continue
        done = []
        state = optimizer.state.get(parameter, {})
        for slot, value in state.items() if path in cuts else ():
            fresh = _cut(f"{path}: {slot}", value, *cuts[path])
            if fresh is not value:
                new.append((state, slot, fresh))
                done.append(slot)
        if done:
            report.cut[path] = done
        else:
            report.kept.append(path)
    for state, slot, fresh in new:
        state[slot] = fresh
    return report


def _cut(slot: str, value: Any, before: tuple[int, ...], axes: Axes) -> Any:
    """A state after the cut; the same object where nothing of it is cut."""
    if isinstance(value, torch.Tensor):
        kept = state_axes(slot, tuple(value.shape), before, axes)
        return value if kept is None else surgery.select(value, kept)
    items = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(items, (list, tuple)) or not any(isinstance(v, torch.Tensor) for v in items):
        return value
    fresh = [_cut(slot, v, before, axes) for v in items]
    if all(a is b for a, b in zip(fresh, items)):
        return value
    return dict(zip(value, fresh)) if isinstance(value, Mapping) else type(value)(fresh)


def _restart(optimizer: torch.optim.LBFGS, report: OptimizerReport) -> OptimizerReport:
    optimizer.state.clear()
    optimizer._numel_cache = None
    report.restarted["history"] = "pairs of steps and gradients of the uncut model say nothing of the cut one"
    return report
