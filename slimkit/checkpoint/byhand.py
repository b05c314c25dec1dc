"""Saving an object by hand and loading it again, on PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.checkpoint.optimizer import plan_optimizer
from slimkit.core import check
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.loading import LoadReport
from slimkit.core.checkpoint.openweights import open_weights
from slimkit.core.checkpoint.saving import Items, Saving
from slimkit.core.checkpoint.weightfile import Array, Entry, Weights
from slimkit.core.files import PathLike
from slimkit.sharded import is_distributed, like_parts_of, one_writes, whole
from slimkit.torchfile import TorchWeightFile, described, restored, write_torch
from slimkit.torchfile import tag_of as torch_tag_of

import torch

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: PathLike,
    choice_func: Callable[[str], bool] | None = None,
    append_dict: Mapping[str, Any] | None = None,
    async_save: bool = False,
    *,
    manifest: bool = True,
) -> Saving:
    """Save a module, a sub-module, or any tensors, numbers and strings, atomically.

    What processes hold parts of (FSDP2) is put together: every process calls, and the first one writes.

    Args:
        save_obj: a module (its state dict), a dict name -> value, or a list of {"name": ..., "data": ...}; values are
            tensors, NumPy arrays, numbers or strings.
        ckpt_file_name: .safetensors, .pt, .pth or .bin; a name without an ending gets .safetensors.
        choice_func: save only the names for which it is true.
        append_dict: more names and values to save along, as {"epoch_size": 10}.
        async_save: copy everything now, write in the background; `.wait()` on the result raises what went wrong.
        manifest: write FILE.manifest.json, by which a load finds the first damaged tensor.

    Returns:
        A `Saving` with `.path`, `.done` and `.wait()`.

    Raises:
        ArgumentTypeError, ArgumentError: an object, name or value that cannot be saved.
        UnsupportedError: a tensor that is sparse, nested, quantised, on the meta device, or of a type that files lack.
        LinkPathError: the file is a symbolic link.
        OSError: the disk is full or the folder cannot be written; an older file is as it was.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/hyper.safetensors"
        >>> save_checkpoint([{"name": "epoch_size", "data": 10}, {"name": "w", "data": torch.ones(2)}], path).done
        True
        >>> load_checkpoint(path)["epoch_size"]
        10
    """
    path = saving.path_to_save(ckpt_file_name, ENDINGS, f"{', '.join(ENDINGS)}; convert_checkpoint writes .ckpt")
    with one_writes("the checkpoint") if _held_together(save_obj) else contextlib.nullcontext(True) as writes:
        items = items_of(save_obj, append_dict).chosen(choice_func)
        if writes:
            return write(path, items, async_save=async_save, manifest=manifest)
    return Saving(path, lambda: None, False)


def _held_together(save_obj: Any) -> bool:
    """Whether processes hold parts of what is saved."""
    if isinstance(save_obj, torch.nn.Module):
        return any(map(is_distributed, save_obj.parameters()))
    if not isinstance(save_obj, (Mapping, list, tuple)):
        return False  # refused by `items_of`
    return any(is_distributed(value) for _, value in saving.listed(save_obj))


def write(
    path: Path, items: Items, *, async_save: bool, manifest: bool, after: Callable[[], object] | None = None
) -> Saving:
    """Write items in the format of the path's ending; `after` is called when they are on the disk."""
    writer = None if path.suffix == ".safetensors" else _write_torch
    return saving.save(path, items, async_save=async_save, with_manifest=manifest, writer=writer, after=after)


def _write_torch(
    path: Path, items: Items, tensors: Iterable[tuple[str, Array]], before: Callable[[Path], object]
) -> None:
    write_torch(path, {n: restored(a, items.entries[n].dtype) for n, a in tensors}, items.values, before)


def items_of(save_obj: Any, append_dict: Mapping[str, Any] | None = None) -> Items:
    """What a module, a dict or a list holds; a tensor with two names in a module is saved under the first."""
    if isinstance(save_obj, torch.nn.Module):
        items, seen = Items(), set()
        for name, tensor in save_obj.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                items.add(name, *described(name, whole(tensor)))
    elif isinstance(save_obj, (Mapping, list, tuple)):
        items = saving.gather(save_obj, _described_or_none)
    else:
        check.wrong_type("save_obj", "a torch.nn.Module, a dict, or a list of {'name': ..., 'data': ...}", save_obj)
    return saving.with_appended(items, append_dict, _described_or_none)


def _described_or_none(name: str, value: Any) -> tuple[Entry, Callable[[], Array]] | None:
    return described(name, whole(value)) if isinstance(value, torch.Tensor) else None


def load_checkpoint(
    ckpt_file_name: PathLike,
    net: torch.nn.Module | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    verify: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint into a dict, which may be edited and saved again; load it into a module if one is given.

    Args:
        ckpt_file_name: .safetensors, .pt, .pth, .bin, a sharded index, a Hugging Face directory, or MindSpore's .ckpt.
        net: also load into this module, in place, as `load_param_into_net` does.
        strict_load: for `net`, as `load_param_into_net` says.
        filter_prefix: names that begin so (or with one of a list) are left out.
        choice_func: only names for which it is true are read.
        verify: hold every tensor against FILE.manifest.json, where there is one.

    Returns:
        name -> tensor on the CPU, number or string.

    Raises:
        FileFormatError: the file is missing or damaged; the first bad tensor is named.
        PatternError: a filter that matches nothing.
        PlanError: it does not fit the module.
    """
    with open_weights(ckpt_file_name, TorchWeightFile, "ckpt_file_name") as source:
        make = lambda _name, array, dtype: restored(array, dtype).clone()
        found = loading.read_all(source, make, filter_prefix, choice_func, verify=verify)
    if net is not None:
        load_param_into_net(net, found, strict_load)
    return found


def load_param_into_net(
    net: torch.nn.Module,
    parameter_dict: Any,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    report_only: bool = False,
    verify: bool = True,
) -> LoadReport:
    """Load a checkpoint into a module, in place; nothing is changed unless all of it fits.

    Args:
        net: the module.
        parameter_dict: what `load_checkpoint` returned, or a path to read tensor by tensor.
        strict_load: names must be equal and every parameter must get a value. False: a name also matches where one of
            the two ends with the other ("net.conv.weight" and "conv.weight"), and parameters may keep their values.
        filter_prefix: names in the checkpoint that begin so (or with one of a list) are not loaded.
        choice_func: only names in the checkpoint for which it is true are loaded.
        optimizer: also restore the state that `TrainableParamsCheckPoint(optimizer_state=True)` saved.
        report_only: what does not fit is only reported.
        verify: hold every tensor against FILE.manifest.json, where there is one.

    Returns:
        A `LoadReport`: loaded, missing, unused, mismatched, renamed, filtered, values, verified.

    Raises:
        PlanError: a tensor without a place, a differing shape, or with strict_load a parameter without a value.
        PatternError: a filter that matches nothing.
        FileFormatError: the file is damaged; the first bad tensor is named.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> load_param_into_net(layer, {"net.weight": torch.ones(1, 2)}).missing
        ['bias']
    """
    bridge.check_model(net, "net")
    state = {n: t for n, t in net.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)

    def assign(name: str, array: Array, dtype: str) -> None:
        with torch.no_grad():
            state[name].copy_(like_parts_of(state[name], restored(array, dtype)))

    with _opened(parameter_dict) as source:
        restore = None
        if optimizer is not None:
            restore = plan_optimizer(net, check.instance(optimizer, torch.optim.Optimizer, "optimizer"), source)
        report = loading.load_into(
            source,
            {n: Entry(torch_tag_of(t), tuple(t.shape)) for n, t in state.items()},
            assign,
            verify=verify,
            strict_load=strict_load,
            filter_prefix=filter_prefix,
            choice_func=choice_func,
            report_only=report_only,
            tied=groups.values(),
            optimizer_apart=restore is not None,
        )
        if restore is not None:
            restore()
        return report


def _opened(parameter_dict: Any) -> Weights:
    if isinstance(parameter_dict, Mapping):
        return saving.in_memory(parameter_dict, _described_or_none)
    return open_weights(parameter_dict, TorchWeightFile, "parameter_dict")
