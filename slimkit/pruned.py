"""Folders that keep a pruned torch model: `save_pruned` and `load_pruned`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit import bridge, surgery
from slimkit.core import files
from slimkit.core.checkpoint.maker import checked, write_maker
from slimkit.core.errors import FileFormatError, PlanError, UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.lazy import door
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.record import check_begins, record_plan
from slimkit.derived import with_derived
from slimkit.turning import turn

import torch
from torch import nn

__getattr__, __dir__ = door("slimkit", room="prune")


def save_pruned(
    directory: PathLike,
    model: nn.Module,
    desc: dict[str, Any],
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model: `plan.json` and `model.safetensors`, no pickle; the folder appears whole or not at all.

    Args:
        directory: the folder; made if missing.
        model: the pruned model.
        desc: the plan that pruned it; after several prunings the whole one, `pruner.whole_desc()`.
        factory: ``package.module:function`` that makes the uncut network, so that `load` can; kept in network.json.
        arguments: keyword arguments of that function, plain values.

    Raises:
        PlanError: `desc` is no plan.
        FileFormatError: the model's shapes are not those that the plan leaves, or the plan begins at a model that was
            pruned already, so that `load_pruned` could not read the folder.
        UnsupportedError: the model's state holds something that is neither a plain tensor nor plain data.
    """
    from safetensors.torch import save_file

    folder = files.save_directory(directory, relative=True)
    if factory is not None:
        checked(factory, arguments)
    plan, model = PrunePlan(desc), bridge.uncompiled(bridge.check_whole(model))
    try:
        plan.match_cut({p: tuple(t.shape) for p, t in surgery.tensors(model).items()})
    except PlanError as error:
        raise FileFormatError(str(error)) from None
    check_begins(model, plan)
    state = model.state_dict()
    seen: dict[Any, str] = {}
    tensors, tied, extra = {}, {}, {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            extra[name] = _plain(name, value)
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise UnsupportedError(
                f"{name!r} is a {value.layout} {value.dtype} tensor on {value.device}, not a plain one"
            )
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = value.detach().cpu().contiguous()
    versions = {path: entry["version"] for path, entry in _metadata(state).items() if "version" in entry}
    with files.atomic_directory(folder) as temporary:
        if factory is not None:
            write_maker(temporary, factory, arguments)
        files.write_json(temporary / "plan.json", {**desc, "tied": tied, "versions": versions, "extra": extra})
        save_file(tensors, str(temporary / "model.safetensors"), metadata={"format": "pt"})


def _plain(name: str, value: Any) -> Any:
    """What a module keeps as its extra state, where JSON brings it back unchanged."""
    try:
        back = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        back = ...
    if repr(back) != repr(value):
        raise UnsupportedError(
            f"{name!r} must be a tensor or plain data to be saved without pickle. Received: {value!r}"
        )
    return value


def _metadata(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(getattr(state, "_metadata", {}))  # torch hangs it on the dict it returns; a user's own may lack it


def load_pruned(directory: PathLike, model: nn.Module) -> nn.Module:
    """Cut a fresh, unpruned model by a saved plan and load the saved weights, in place; on an error it is as it was.

    Args:
        directory: what `save_pruned` wrote.
        model: a model of the original make.

    Returns:
        The same model, pruned.

    Raises:
        PlanError: the plan belongs to another model.
        FileFormatError: a file is damaged, or a tensor is missing, left over or of the wrong shape.
    """
    folder = files.as_path(directory, "directory")
    desc = files.read_json(folder / "plan.json", "directory/plan.json")
    plan = PrunePlan(desc)
    given, model = model, bridge.uncompiled(bridge.check_whole(model))
    own = model.state_dict()
    state = _read(folder, desc, own)
    share_again = turn(model, (), plan.parted)
    try:
        _load(model, plan, state, folder)
    except BaseException:
        share_again()
        raise
    return given


def _load(model: nn.Module, plan: PrunePlan, state: Mapping[str, Any], folder: Path) -> None:
    """Cut a model and load the saved state, in place; on an error it is as it was."""
    found = surgery.tensors(model)
    names = plan.match({p: tuple(t.shape) for p, t in found.items()})
    with surgery.unchanged_on_error(model, [found[names[p]] for p in plan.indices]):
        undo = surgery.cut(model, with_derived(model, plan), names)
        try:
            model.load_state_dict(state, strict=True)
        except Exception as error:
            undo()
            raise FileFormatError(f"{folder} does not fit the model that its plan leaves: {error}") from error
        record_plan(model, {k: v for k, v in plan.desc.items() if k not in ("tied", "versions", "extra")})


def _read(folder: Path, desc: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state, with the versions that modules ask for."""
    from collections import OrderedDict

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = files.readable_file(folder / "model.safetensors", "directory/model.safetensors")
    try:
        state: OrderedDict[str, Any] = OrderedDict(load_file(str(file)))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from None
    try:
        for name, first in desc.get("tied", {}).items():
            state[name] = state[first]
        state.update(desc.get("extra", {}))
        # Folders without versions were written by the same classes, as far as is known.
        metadata = {path: dict(entry) for path, entry in _metadata(own).items()}
        for path, version in desc.get("versions", {}).items():
            metadata.setdefault(path, {})["version"] = version
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{folder / 'plan.json'} is damaged: {type(error).__name__}: {error}") from None
    # A module may read a state of another version under other names; of its own version the names are settled.
    if metadata == _metadata(own) and set(state) != set(own):
        odd = sorted(set(state) ^ set(own))
        raise FileFormatError(f"{file} must hold exactly this model's tensors; these differ: {odd[:5]}")
    for name, value in state.items():
        mine = own.get(name)
        if not isinstance(mine, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        if _kind(mine) != _kind(value):
            raise FileFormatError(f"{file} holds {name!r} as {value.dtype}, and the model's is {mine.dtype}")
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
