"""Folders that keep a pruned MindSpore cell: `save_pruned` and `load_pruned`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.checkpoint.maker import checked, write_maker
from slimkit.core.errors import FileFormatError, PlanError
from slimkit.core.files import PathLike
from slimkit.core.lazy import door
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.record import check_begins, record_plan
from slimkit_ms import bridge
from slimkit_ms.prune import MindSporePrune
from slimkit_ms.surgery.layers import aligned
from slimkit_ms.turning import turn

import mindspore as ms
from mindspore import nn

__getattr__, __dir__ = door("slimkit_ms", room="prune")


def save_pruned(
    directory: PathLike,
    model: nn.Cell,
    desc: dict[str, Any],
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned cell: `plan.json` and `model.safetensors`, no pickle; the folder appears whole or not at all.

    Args:
        directory: the folder; made if missing.
        model: the pruned cell.
        desc: the plan that pruned it; after several prunings the whole one, `pruner.whole_desc()`.
        factory: ``package.module:function`` that makes the uncut network, so that `load` can; kept in network.json.
        arguments: keyword arguments of that function, plain values.

    Raises:
        PlanError: `desc` is no plan.
        FileFormatError: the cell's shapes are not those that the plan leaves, or the plan begins at a cell that was
            pruned already, so that `load_pruned` could not read the folder.
    """
    folder = files.save_directory(directory, relative=True)
    if factory is not None:
        checked(factory, arguments)
    plan = PrunePlan(desc)
    found = {paths[0]: p for p, paths in bridge.parameter_paths(bridge.check_model(model))}
    try:
        plan.match_cut({path: tuple(p.shape) for path, p in found.items()})
    except PlanError as error:
        raise FileFormatError(str(error)) from None
    check_begins(model, plan)
    with files.atomic_directory(folder) as temporary:
        if factory is not None:
            write_maker(temporary, factory, arguments)
        files.write_json(temporary / "plan.json", plan.desc)
        files.write_tensors(
            temporary / "model.safetensors", {p: bridge.as_numpy(t) for p, t in found.items()}, {"format": "np"}
        )


def load_pruned(directory: PathLike, model: nn.Cell) -> nn.Cell:
    """Cut a fresh, unpruned cell by a saved plan and load the saved weights, in place; on an error it is as it was.

    Args:
        directory: what `save_pruned` wrote.
        model: a cell of the original make.

    Returns:
        The same cell, pruned.

    Raises:
        PlanError: the plan belongs to another model.
        FileFormatError: a file is damaged, or a tensor is missing, left over or of the wrong shape or type.
    """
    folder = files.as_path(directory, "directory")
    plan = PrunePlan(files.read_json(folder / "plan.json", "directory/plan.json"))
    tensors, _ = files.read_tensors(folder / "model.safetensors", "directory/model.safetensors")
    share_again = turn(bridge.check_model(model), (), plan.parted)
    try:
        return _load(model, plan, tensors, folder)
    except BaseException:
        share_again()
        raise


def _load(model: nn.Cell, plan: PrunePlan, tensors: Mapping[str, Any], folder: Path) -> nn.Cell:
    """Cut a cell and load the saved values, in place; on an error it is as it was."""
    wing = MindSporePrune(model, None)
    wanted = wing.shapes()
    names = plan.match(wanted)
    for path, axes in plan.indices.items():
        name = names[path]
        kept = aligned(wanted[name], axes)
        wanted[name] = tuple(n if index is None else len(index) for n, index in zip(wanted[name], kept))
    odd = sorted({p for p in {*wanted, *tensors} if p not in tensors or wanted.get(p) != tensors[p].shape})
    if odd:
        raise FileFormatError(f"{folder} must hold exactly this model's tensors; these differ: {odd[:5]}")
    old = {paths[0]: (p, bridge.as_numpy(p)) for p, paths in bridge.parameter_paths(model)}
    take_back = wing.cut(plan, names)
    try:
        for parameter, paths in bridge.parameter_paths(model):
            parameter.set_data(ms.Tensor(tensors[paths[0]]))
        record_plan(model, dict(plan.desc))
    except BaseException as error:
        take_back()
        for parameter, values in old.values():
            parameter.set_data(ms.Tensor(values))
        if isinstance(error, Exception):
            raise FileFormatError(f"{folder} does not fit the model that its plan leaves: {error}") from error
        raise
    return model
