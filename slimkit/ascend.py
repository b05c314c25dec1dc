"""Ascend for PyTorch: the shared checks and targets, W16A16S and W8A8S folders from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimkit import bridge, kinds
from slimkit.core.ascend import w8a8s
from slimkit.core.ascend.int8 import Int8Layer
from slimkit.core.ascend.w16a16s import W16A16SReport, config_told_by, save_arrays
from slimkit.core.files import PathLike
from slimkit.core.lazy import door as _door
from slimkit.sparse.framework import TorchSparse

import torch

__getattr__, __dir__ = _door("slimkit", "ascend")


def save_w16a16s(
    directory: PathLike, model: Any, config: Any = None, *, targets: Sequence[str] | None = None
) -> W16A16SReport:
    """Write a sparse model as a W16A16S folder, from which MindIE's tools make compressed weights for the 310P.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        model: the sparse model, which is left as it is, or a dict of tensor name -> NumPy array.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the model's own config.
        targets: globs over tensor names to mark W16A16S. None: every matrix "*.weight" with at least 5 % zeros.

    Returns:
        What was written, with advice on the ratio.

    Raises:
        ArgumentTypeError: `model` is neither a model nor a dict of arrays.
        ArgumentError: no config, no sparse tensor, or a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Source:
        The layout of MindIE's documentation, "W16A16SC sparse quantization":
        https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = torch.nn.init.eye_(net[0].weight)
        >>> save_w16a16s("/tmp/w16a16s-torch", net, {"model_type": "none"}).sparse
        {'0.weight': 0.75}
    """
    if isinstance(model, dict):
        return save_arrays(directory, model, config_told_by(None, config), targets=targets)
    arrays, tied = _arrays(bridge.check_whole(model))
    return save_arrays(directory, arrays, config_told_by(model, config), targets=targets, tied=tied)


def save_w8a8s(
    directory: PathLike,
    model: Any,
    calibration: Any,
    config: Any = None,
    *,
    targets: Sequence[str] | None = None,
    ranges: str = "minmax",
    most_error: float = w8a8s.MOST_ERROR,
) -> w8a8s.W8A8SReport:
    """Write a model on the int8 grid as a W8A8S folder, which vLLM-Ascend and MindIE read for the 310P.

    The weights are not rounded here: compress with ``SparseConfig(weight_bits=8)``, which rounds while it solves.
    Inputs get one static step a layer, from what calibration shows. Layers that need finer ones stay float16.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        model: the sparse model, which is left as it is.
        calibration: batches, as `Compressor.compress` takes them: between which values each layer's inputs lie.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the model's own config.
        targets: globs over layer names. None: every linear layer whose weight is on the grid.
        ranges: "minmax", or "percentile": a ten-thousandth of the inputs may lie beyond either end.
        most_error: the share of a layer's answers that rounding its inputs may change, 0.1 by default. Where it changes
            more the layer stays float16, with those that are served as one with it. In language models these are
            layers that see a few tokens with huge activations.

    Returns:
        What was written: each layer's share of zeros, its inputs' range and what rounding them changes; the layers that
        stay float16.

    Raises:
        ArgumentTypeError: `model` is no sparse model, or the batches are none.
        ArgumentError: no layer on the grid; a target is not; of layers that are served as one (query, key and value;
            gate and up) some are not; no batch reached a layer; rounding changes more than `most_error` of a target, or
            of every layer; a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Example:
        >>> from slimkit import Compressor, SparseConfig
        >>> net, batches = torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.randn(32, 8)]
        >>> _ = Compressor(net, SparseConfig(method="hessian", weight_bits=8)).compress(batches)
        >>> list(save_w8a8s("/tmp/w8a8s-torch", net, batches, {"model_type": "none"}).layers)
        ['0']
    """
    host = TorchSparse(bridge.refuse_offloaded(bridge.check_whole(model)))
    arrays, tied = _arrays(model)
    told = config_told_by(model, config)
    return w8a8s.save(
        directory,
        host,
        arrays,
        calibration,
        told,
        targets=targets,
        ranges=ranges,
        most_error=most_error,
        tied=tied,
    )


def emulate_w8a8s(model: Any, directory: PathLike) -> list[str]:
    """Let the int8 layers of a W8A8S folder take the place of a model's own, in place: they compute as the device does.

    For `compare_models` and whatever else wants to know what int8 costs. The integer product is exact; what the device
    itself adds is not known here. The model's other parameters stay as they are.

    Args:
        model: the model that the folder was written from, or another of its shape.
        directory: the folder.

    Returns:
        The layers that were replaced.

    Raises:
        FileFormatError: as `load_w8a8s`.
        ArgumentError: a layer is missing in the model or is no linear layer of that shape; nothing is replaced then.

    Example:
        >>> from slimkit import Compressor, SparseConfig
        >>> net, batches = torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.randn(32, 8)]
        >>> _ = Compressor(net, SparseConfig(method="hessian", weight_bits=8)).compress(batches)
        >>> _ = save_w8a8s("/tmp/w8a8s-torch", net, batches, {"model_type": "none"})
        >>> emulate_w8a8s(net, "/tmp/w8a8s-torch")
        ['0']
    """
    layers = w8a8s.load_w8a8s(directory).layers
    modules = dict(bridge.check_whole(model).named_modules())
    for name, layer in layers.items():
        own = modules.get(name)
        if own is not None and kinds.is_kind(own, "linear") and not kinds.is_in_out(own):
            w8a8s.demand_linear(name, layer, own.weight.shape)
        else:
            w8a8s.demand_linear(name, layer, None)
    for name, layer in layers.items():
        parent, _, own_name = name.rpartition(".")
        setattr(modules[parent], own_name, _Int8Linear(layer, modules[name].weight.device))
    return list(layers)


class _Int8Linear(torch.nn.Module):
    """What the device computes, with an exact product: float64 holds every sum of int8 products."""

    def __init__(self, layer: Int8Layer, device: torch.device) -> None:
        super().__init__()
        for name, value in (
            ("weight", layer.weight.astype(np.float64)), ("shift", layer.quant_bias.astype(np.float64)),
            ("scale", layer.scale), ("reciprocal", np.float32(1) / layer.input_scale.astype(np.float32)),
            ("offset", layer.input_offset.astype(np.float32)),
        ):  # fmt: skip
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.clamp(torch.round(x.float() * self.reciprocal + self.offset), -128, 127).double()
        product = torch.nn.functional.linear(held, self.weight, self.shift)  # (..., n)
        return (product.float() * self.scale).to(x.dtype)


def _arrays(model: torch.nn.Module) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """The tensors by name, and of those that are tied the name of each one's first."""
    firsts: dict[int, str] = {}
    named = [(n, firsts.setdefault(id(p), n)) for n, p in model.named_parameters(remove_duplicate=False)]
    tied = {name: first for name, first in named if name != first}
    # NumPy knows no bfloat16; every float becomes float16 in the end.
    arrays = {
        n: (t.float() if t.is_floating_point() else t).detach().cpu().numpy() for n, t in model.state_dict().items()
    }
    return arrays, tied
