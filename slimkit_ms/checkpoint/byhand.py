"""Saving an object by hand and loading it again, on MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint import loading, saving
from slimkit.core.checkpoint.ckpt import TAGS, TYPES
from slimkit.core.checkpoint.loading import LoadReport
from slimkit.core.checkpoint.openweights import open_weights, refuse_torch
from slimkit.core.checkpoint.saving import Items, Saving
from slimkit.core.checkpoint.weightfile import Array, Entry, Weights, decode
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import PathLike
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

ENDINGS = (".ckpt", ".safetensors")


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: PathLike,
    choice_func: Callable[[str], bool] | None = None,
    append_dict: Mapping[str, Any] | None = None,
    async_save: bool = False,
    *,
    manifest: bool = True,
) -> Saving:
    """Save a cell, a sub-cell, or any tensors, numbers and strings, atomically.

    Args:
        save_obj: a cell (its parameters), a dict name -> value, or a list of {"name": ..., "data": ...}; values are
            tensors, parameters, NumPy arrays, numbers or strings.
        ckpt_file_name: .ckpt or .safetensors; a name without an ending gets .ckpt. MindSpore itself reads both.
        choice_func: save only the names for which it is true.
        append_dict: more names and values to save along, as {"epoch_size": 10}.
        async_save: copy everything now, write in the background; `.wait()` on the result raises what went wrong.
        manifest: write FILE.manifest.json, by which a load finds the first damaged tensor; without it a .ckpt ends with
            MindSpore's own checksum.

    Returns:
        A `Saving` with `.path`, `.done` and `.wait()`.

    Raises:
        ArgumentTypeError, ArgumentError: an object, name or value that cannot be saved.
        LinkPathError: the file is a symbolic link.
        OSError: the disk is full or the folder cannot be written; an older file is as it was.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/hyper.ckpt"
        >>> save_checkpoint([{"name": "epoch_size", "data": 10}, {"name": "w", "data": ms.Tensor([1.0])}], path).done
        True
        >>> load_checkpoint(path)["epoch_size"]
        10
    """
    path = saving.path_to_save(ckpt_file_name, ENDINGS, " or ".join(ENDINGS))
    items = items_of(save_obj, append_dict).chosen(choice_func)
    return saving.save(path, items, async_save=async_save, with_manifest=manifest, crc=not manifest)


def items_of(save_obj: Any, append_dict: Mapping[str, Any] | None = None) -> Items:
    """What a cell, a dict or a list holds."""
    if isinstance(save_obj, nn.Cell):
        items = parameter_items(save_obj.get_parameters())
    elif isinstance(save_obj, (list, tuple)) and save_obj and all(isinstance(v, ms.Parameter) for v in save_obj):
        items = parameter_items(save_obj)
    elif isinstance(save_obj, (Mapping, list, tuple)):
        items = saving.gather(save_obj, _described_or_none)
    else:
        check.wrong_type("save_obj", "a mindspore.nn.Cell, a dict, or a list of {'name': ..., 'data': ...}", save_obj)
    return saving.with_appended(items, append_dict, _described_or_none)


def parameter_items(parameters: Any) -> Items:
    """Parameters under their names; one that several cells share comes once."""
    items, seen = Items(), set()
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            items.add(parameter.name, *described(parameter.name, parameter))
    return items


def described(name: str, tensor: ms.Tensor) -> tuple[Entry, Callable[[], Array]]:
    """A tensor's entry, and how its stored values are fetched; UnsupportedError for one that files cannot hold."""
    if isinstance(tensor, (ms.COOTensor, ms.CSRTensor, ms.RowTensor)):
        raise UnsupportedError(f"tensor {name!r} is sparse ({type(tensor).__name__}): save to_dense() of it.")
    kind = str(tensor.dtype)
    if kind not in TAGS:
        raise UnsupportedError(f"tensor {name!r} has elements of type {kind}; files hold {', '.join(TYPES.values())}.")
    return Entry(TAGS[kind], tuple(tensor.shape)), partial(stored, tensor)


def stored(tensor: ms.Tensor) -> Array:
    """A tensor's values in the stored form of weight files: NumPy, bfloat16 as bits."""
    array = np.asarray(tensor.asnumpy())
    return array.view(np.uint16) if str(tensor.dtype) == "BFloat16" else array


def restored(array: Array, dtype: str) -> ms.Tensor:
    """The tensor of a stored array."""
    values = decode(array, dtype)
    return ms.Tensor(values, ms.bfloat16) if dtype == "BF16" else ms.Tensor(values)


def _described_or_none(name: str, value: Any) -> tuple[Entry, Callable[[], Array]] | None:
    kinds = (ms.Tensor, ms.COOTensor, ms.CSRTensor, ms.RowTensor)
    return described(name, value) if isinstance(value, kinds) else None


def load_checkpoint(
    ckpt_file_name: PathLike,
    net: nn.Cell | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    verify: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint into a dict, which may be edited and saved again; load it into a cell if one is given.

    Args:
        ckpt_file_name: .ckpt, .safetensors, a sharded index of the latter, or a folder with either.
        net: also load into this cell, in place, as `load_param_into_net` does.
        strict_load: for `net`, as `load_param_into_net` says.
        filter_prefix: names that begin so (or with one of a list) are left out.
        choice_func: only names for which it is true are read.
        verify: hold every tensor against FILE.manifest.json, where there is one.

    Returns:
        name -> Parameter, number or string.

    Raises:
        FileFormatError: the file is missing or damaged, or a PyTorch file; the first bad tensor is named.
        PatternError: a filter that matches nothing.
        PlanError: it does not fit the cell.
    """
    with open_weights(ckpt_file_name, refuse_torch, "ckpt_file_name") as source:
        make = lambda name, array, dtype: ms.Parameter(restored(array, dtype), name=name)
        found = loading.read_all(source, make, filter_prefix, choice_func, verify=verify)
    if net is not None:
        load_param_into_net(net, found, strict_load)
    return found


def load_param_into_net(
    net: nn.Cell,
    parameter_dict: Any,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    optimizer: nn.Cell | None = None,
    report_only: bool = False,
    verify: bool = True,
) -> LoadReport:
    """Load a checkpoint into a cell, in place; nothing is changed unless all of it fits.

    Args:
        net: the cell.
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
        >>> layer = nn.Dense(2, 1)
        >>> load_param_into_net(layer, {"net.weight": ms.Tensor([[1.0, 1.0]])}).missing
        ['bias']
    """
    bridge.check_model(net, "net")
    parameters = {p.name: p for p in net.get_parameters()}
    if optimizer is not None:
        check.instance(optimizer, nn.Optimizer, "optimizer")
        parameters.update({p.name: p for p in optimizer.get_parameters()})

    def assign(name: str, array: Array, dtype: str) -> None:
        parameters[name].set_data(ms.Tensor(decode(array, dtype), parameters[name].dtype))

    with _opened(parameter_dict) as source:
        return loading.load_into(
            source,
            {n: described(n, p)[0] for n, p in parameters.items()},
            assign,
            verify=verify,
            strict_load=strict_load,
            filter_prefix=filter_prefix,
            choice_func=choice_func,
            report_only=report_only,
        )


def _opened(parameter_dict: Any) -> Weights:
    if isinstance(parameter_dict, Mapping):
        return saving.in_memory(parameter_dict, _described_or_none)
    return open_weights(parameter_dict, refuse_torch, "parameter_dict")
