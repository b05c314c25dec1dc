"""Optimizers of MindSpore cells that were pruned: their moments follow the cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError, PlanError, UnsupportedError
from slimkit.core.lazy import door
from slimkit.core.prune.optimizer_state import Axes, OptimizerReport, state_axes
from slimkit.core.prune.plan import PrunePlan
from slimkit_ms import bridge
from slimkit_ms.surgery.layers import aligned, resize

import mindspore as ms
from mindspore import nn
from mindspore.experimental import optim

__getattr__, __dir__ = door("slimkit_ms", room="prune")


def migrate_optimizer(optimizer: nn.Cell, model: nn.Cell, desc: dict[str, Any]) -> OptimizerReport:
    """Cut an optimizer's state by the plan that cut its model, in place, so that training goes on where it was.

    Parameters of a cell stay the same objects, so that training cells and the optimizer itself go on meaning them; only
    moments and other states of the old shapes are cut. Call it once after each cut; a state that was cut already is
    left alone.

    Args:
        optimizer: an optimizer of mindspore.nn or mindspore.experimental.optim whose states have their parameters'
            shapes, are scalars, or lack one axis.
        model: the pruned cell.
        desc: the plan that pruned it; after several cuts `merge_desc(first, second)`.

    Returns:
        What was cut and kept.

    Raises:
        ArgumentError: the optimizer holds no parameter of the model.
        PlanError: the model is not the one that desc pruned, or a state has an unknown shape; nothing was changed.
        UnsupportedError: THOR, whose second-order statistics are of no parameter's shape.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(8, 64), nn.ReLU(), nn.Dense(64, 4))
        >>> adam = nn.Adam(net.trainable_params())
        >>> from slimkit_ms import PruneMindSpore
        >>> desc = PruneMindSpore(net, ms.ops.ones((1, 8))).prune(0.5, [])
        >>> report = migrate_optimizer(adam, net, desc)
        >>> adam.moment1[0].shape == net[0].weight.shape
        True
    """
    check.instance(optimizer, (nn.Optimizer, optim.Optimizer), "optimizer", "an optimizer of MindSpore")
    if type(optimizer).__name__.lower().startswith("thor"):
        raise UnsupportedError(
            "THOR keeps statistics of layers rather than of parameters: make a new one after pruning"
        )
    plan = PrunePlan(desc)
    found = bridge.parameter_paths(bridge.check_model(model))
    names = plan.match_cut({paths[0]: tuple(p.shape) for p, paths in found})
    paths = {id(parameter): paths[0] for parameter, paths in found}
    held = list(optimizer.parameters)
    report = OptimizerReport(elsewhere=sum(id(p) not in paths for p in held))
    if held and report.elsewhere == len(held):
        raise ArgumentError("optimizer must hold parameters of the model. Received: one that holds none of them")
    cuts: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for path, axes in plan.indices.items():
        here = next(tuple(p.shape) for p, all_paths in found if names[path] in all_paths)
        mine = aligned(here, axes)
        old = iter(n for n, index in zip(plan.shapes[path], axes) if index is not None)
        cuts[names[path]] = tuple(n if index is None else next(old) for n, index in zip(here, mine)), mine
    new: list[tuple[ms.Parameter, Any]] = []
    for place, parameter in enumerate(held):
        name = paths.get(id(parameter))
        if name is None:
            continue
        done = []
        for slot, state in _states(optimizer, place, parameter) if name in cuts else ():
            kept = state_axes(f"{name}: {slot}", tuple(state.shape), *cuts[name])
            if kept is not None:
                values = state.asnumpy()
                for axis, index in enumerate(kept):
                    values = values if index is None else np.take(values, index, axis=axis)
                new.append((state, values))
                done.append(slot)
        if done:
            report.cut[name] = done
        else:
            report.kept.append(name)
    for state, values in new:
        resize(state, values)
    if new:
        ms.ms_memory_recycle()  # a step that was compiled before would write at the old shapes
    return report


def _states(optimizer: nn.Cell, place: int, parameter: ms.Parameter) -> Iterator[tuple[str, ms.Parameter]]:
    """The states that belong to one parameter: those at its place in tuples as long as the parameters'."""
    number = len(optimizer.parameters)
    for owner in {id(cell): cell for _, cell in optimizer.cells_and_names()}.values():
        for name, value in vars(owner).items():
            if not isinstance(value, (tuple, list)) or not value or not isinstance(value[0], ms.Parameter):
                continue
            if len(value) != number:
                if any(isinstance(v, ms.Parameter) and v.size > 1 for v in value):
                    raise PlanError(f"the optimizer keeps {len(value)} states {name!r} for {number} parameters")
                continue
            if isinstance(value[place], ms.Parameter) and value[place] is not parameter:
                yield name, value[place]
