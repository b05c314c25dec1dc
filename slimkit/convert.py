"""Conversion of checkpoints: between PyTorch and MindSpore, from the PyTorch side, and out of GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slimkit import bridge  # noqa: F401 - says in one line that torch is missing
from slimkit.core.convert import gguffile
from slimkit.core.convert import stream as convert
from slimkit.core.convert.gguffile import GgufReport
from slimkit.core.convert.stream import ConvertReport
from slimkit.core.errors import UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.lazy import library

import torch


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

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> torch.save({"bn.weight": torch.ones(2), "bn.bias": torch.zeros(2)}, folder + "/net.pt")
        >>> convert_checkpoint(folder + "/net.pt", folder + "/net.ckpt").renamed
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
        torch=lambda: torch,
    )


def convert_gguf(src: PathLike, dst: PathLike, *, dtype: str = "float32", replace: bool = False) -> GgufReport:
    """Turn a GGUF file into a Hugging Face folder that `from_pretrained` reads.

    Values are dequantised by the library `gguf`, a few megabytes at a time, so that memory does not grow with the
    model. Names, the layout of queries and keys, the epsilon of norms and scaled positions become those of
    transformers; the tokenizer is written by transformers, with the chat template where the file has one.

    Args:
        src: the .gguf file, of the architecture llama, qwen2 or qwen3, in any type that `gguf` dequantises.
        dst: the folder to make; it must not exist yet, or be empty.
        dtype: "float32", "float16" or "bfloat16". Only float32 holds every number of a quantised file exactly.
        replace: let the new folder take the place of a filled one.

    Returns:
        A `GgufReport`.

    Raises:
        ArgumentError: `dst` is in use, or `dtype` is none of the three.
        FileFormatError: the file is damaged, or a tensor is missing or of another shape.
        UnsupportedError: an architecture, a key, a tensor or a type that slimkit does not know, or a number that
            float16 cannot hold. Nothing is written after an error.
        MissingFrameworkError: `gguf` is not installed: pip install 'slimkit[gguf]'.

    Example:
        >>> convert_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2").types  # doctest: +SKIP
        {'Q8_0': 1, 'F32': 61, 'Q4_1': 210}
    """
    return gguffile.convert_gguf(src, dst, dtype, _write_tokenizer, replace=replace)


def _write_tokenizer(src: Path, folder: Path) -> None:
    transformers = library("transformers", "hf")
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(src.parent), gguf_file=src.name)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError, OSError) as error:
        raise UnsupportedError(f"transformers cannot read the tokenizer of {src}: {str(error)[:200]}") from None
    found.save_pretrained(str(folder))
