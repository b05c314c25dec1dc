"""Conversion of checkpoints between PyTorch and MindSpore, from the MindSpore side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slimkit.core.convert import stream as convert
from slimkit.core.convert.stream import ConvertReport
from slimkit.core.files import PathLike
from slimkit.core.lazy import require
from slimkit_ms import bridge  # noqa: F401 - says in one line that MindSpore is missing


def convert_checkpoint(
    src: PathLike,
    dst: PathLike,
    source_net: Any = None,
    result_net: Any = None,
    name_map: Mapping[Any, Any] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    *,
    to: str | None = None,
    inputs: Any = None,
    manifest: bool = True,
    strict: bool = True,
) -> ConvertReport:
    """Turn a PyTorch checkpoint into one for MindSpore, or the other way round.

    With both networks given, tensors are matched by the networks' own layers: by name, under a common prefix, then by
    order and shape. Without them rules decide: gamma, beta, moving_mean, moving_variance and embedding_table against
    weight, bias, running_mean, running_var and weight. Values are copied bit by bit, bfloat16 too, tensor by tensor.

    Args:
        src: .pt .pth .bin .pkl, .safetensors, a sharded index, a Hugging Face directory, or .ckpt.
        dst: .ckpt or .safetensors for MindSpore; .safetensors, .pt, .pth or .bin for PyTorch; a folder gets
            model.safetensors.
        source_net: the network that `src` belongs to.
        result_net: the network, of the other framework, that `dst` is for.
        name_map: name in `src` -> name in `dst`; a key "re:PATTERN" replaces a part of names, before any rule. A
            list of names, or a dict of names to rows, splits a fused tensor; a tuple of names as the key joins several.
        choice_func: only tensors of `src` for whose names it is true are converted.
        to: "torch" or "mindspore", where endings and networks leave it open.
        inputs: NumPy array, tuple of arrays, or dict of arrays: load both networks, in place, run both on it, and
            report the largest difference of their outputs.
        manifest: write FILE.manifest.json.
        strict: refuse a tensor without a place and a place without a tensor; False reports them.

    Returns:
        A `ConvertReport`.

    Raises:
        ArgumentError: direction or endings contradict each other.
        PlanError: names or shapes do not fit. Nothing is written.
        FileFormatError, LinkPathError: `src` is damaged, missing or a link.
        MissingFrameworkError: a .pt .pth .bin .pkl file, and PyTorch is not installed.

    Example:
        >>> import tempfile, numpy, slimkit_ms
        >>> folder = tempfile.mkdtemp()
        >>> tensors = {"bn.weight": numpy.ones(2), "bn.bias": numpy.zeros(2)}
        >>> _ = slimkit_ms.save_checkpoint(tensors, folder + "/net.safetensors")
        >>> convert_checkpoint(folder + "/net.safetensors", folder + "/net.ckpt").renamed
        {'bn.weight': 'bn.gamma', 'bn.bias': 'bn.beta'}
    """
    return convert.convert(
        src,
        dst,
        to=to,
        source_net=source_net,
        result_net=result_net,
        name_map=name_map,
        choice_func=choice_func,
        inputs=inputs,
        with_manifest=manifest,
        strict=strict,
        torch=_torch,
    )


def _torch() -> Any:
    require("torch")
    import torch

    return torch
