"""Ascend for MindSpore: the shared checks and targets, W16A16S and W8A8S folders from a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimkit.core.ascend import w8a8s
from slimkit.core.ascend.int8 import Int8Layer
from slimkit.core.ascend.w16a16s import W16A16SReport, config_told_by, save_arrays
from slimkit.core.files import PathLike
from slimkit.core.lazy import door as _door
from slimkit.core.naming import torch_name
from slimkit_ms import bridge, kinds
from slimkit_ms.sparse.framework import MindSporeSparse

import mindspore as ms
from mindspore import nn, ops

__getattr__, __dir__ = _door("slimkit_ms", "ascend")


def save_w16a16s(
    directory: PathLike, model: Any, config: Any = None, *, targets: Sequence[str] | None = None
) -> W16A16SReport:
    """Write a sparse cell as a W16A16S folder, from which MindIE's tools make compressed weights for the 310P.

    Args:
        directory: the folder; made if missing, other files in it are left alone.
        model: the sparse cell, which is left as it is, or a dict of tensor name -> NumPy array. Parameters are written
            by PyTorch's names ("norm.weight", not "norm.gamma"), as the readers of these folders expect.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the cell's own config.
        targets: globs over tensor names to mark W16A16S. None: every matrix "*.weight" with at least 5 % zeros.

    Returns:
        What was written, with advice on the ratio.

    Raises:
        ArgumentTypeError: `model` is neither a cell nor a dict of arrays.
        ArgumentError: no config, no sparse tensor, or a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Source:
        The layout of MindIE's documentation, "W16A16SC sparse quantization":
        https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html

    Example:
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 4, weight_init="identity"))
        >>> save_w16a16s("/tmp/w16a16s-ms", net, {"model_type": "none"}).sparse
        {'0.weight': 0.75}
    """
    if isinstance(model, dict):
        return save_arrays(directory, model, config_told_by(None, config), targets=targets)
    arrays, tied = _arrays(bridge.check_model(model))
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
        model: the sparse cell, which is left as it is.
        calibration: batches, as `Compressor.compress` takes them: between which values each layer's inputs lie.
        config: what config.json shall say, or a Hugging Face folder whose config.json and tokenizer files are taken.
            None: the cell's own config.
        targets: globs over layer names. None: every linear layer whose weight is on the grid.
        ranges: "minmax", or "percentile": a ten-thousandth of the inputs may lie beyond either end.
        most_error: the share of a layer's answers that rounding its inputs may change, 0.1 by default. Where it changes
            more the layer stays float16, with those that are served as one with it. In language models these are
            layers that see a few tokens with huge activations.

    Returns:
        What was written: each layer's share of zeros, its inputs' range and what rounding them changes; the layers that
        stay float16.

    Raises:
        ArgumentTypeError: `model` is no sparse cell, or the batches are none.
        ArgumentError: no layer on the grid; a target is not; of layers that are served as one (query, key and value;
            gate and up) some are not; no batch reached a layer; rounding changes more than `most_error` of a target, or
            of every layer; a value beyond float16.
        PatternError: a target matches nothing.
        FileFormatError: the folder of `config` holds no readable config.json.

    Example:
        >>> from slimkit_ms import Compressor, SparseConfig
        >>> net = nn.SequentialCell(nn.Dense(8, 4))
        >>> batches = [ms.Tensor(np.random.default_rng(0).standard_normal((32, 8)), ms.float32)]
        >>> _ = Compressor(net, SparseConfig(method="hessian", weight_bits=8)).compress(batches)
        >>> list(save_w8a8s("/tmp/w8a8s-ms", net, batches, {"model_type": "none"}).layers)
        ['0']
    """
    host = MindSporeSparse(bridge.check_model(model))
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
    """Let the int8 layers of a W8A8S folder take the place of a cell's own, in place: they compute as the device does.

    For `compare_models` and whatever else wants to know what int8 costs. The integer product is exact; what the device
    itself adds is not known here. The cell's other parameters stay as they are.

    Args:
        model: the cell that the folder was written from, or another of its shape.
        directory: the folder.

    Returns:
        The layers that were replaced.

    Raises:
        FileFormatError: as `load_w8a8s`.
        ArgumentError: a layer is missing in the cell or is no Dense of that shape; nothing is replaced then.

    Example:
        >>> from slimkit_ms import Compressor, SparseConfig
        >>> net = nn.SequentialCell(nn.Dense(8, 4))
        >>> batches = [ms.Tensor(np.random.default_rng(0).standard_normal((32, 8)), ms.float32)]
        >>> _ = Compressor(net, SparseConfig(method="hessian", weight_bits=8)).compress(batches)
        >>> _ = save_w8a8s("/tmp/w8a8s-ms", net, batches, {"model_type": "none"})
        >>> emulate_w8a8s(net, "/tmp/w8a8s-ms")
        ['0']
    """
    layers = w8a8s.load_w8a8s(directory).layers
    cells = dict(bridge.check_model(model).cells_and_names())
    for name, layer in layers.items():
        own = cells.get(name)
        w8a8s.demand_linear(name, layer, kinds.weight_of(own).shape if kinds.is_kind(own, "linear") else None)
    for name, layer in layers.items():
        bridge.set_module(model, name, _Int8Dense(layer, kinds.activation_of(cells[name])))
    return list(layers)


class _Int8Dense(nn.Cell):
    """What the device computes, with an exact product: float64 holds every sum of int8 products."""

    def __init__(self, layer: Int8Layer, activation: Any) -> None:
        super().__init__()
        self.activation = activation
        self.held_weight = ms.Tensor(layer.weight.T.astype(np.float64))
        self.shift = ms.Tensor(layer.quant_bias.astype(np.float64))
        self.scale = ms.Tensor(layer.scale)
        self.reciprocal = ms.Tensor(np.float32(1) / layer.input_scale.astype(np.float32))
        self.offset = ms.Tensor(layer.input_offset.astype(np.float32))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        held = ops.clip_by_value(ops.round(x.astype(ms.float32) * self.reciprocal + self.offset), -128, 127)
        product = ops.matmul(held.astype(ms.float64), self.held_weight) + self.shift  # (..., n)
        answer = (product.astype(ms.float32) * self.scale).astype(x.dtype)
        return answer if self.activation is None else self.activation(answer)


def _arrays(model: nn.Cell) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters by PyTorch's names, and of those that are tied the name of each one's first."""
    held = bridge.parameter_paths(model)
    arrays = {torch_name(path): bridge.as_numpy(parameter) for parameter, paths in held for path in paths}
    return arrays, {torch_name(path): torch_name(paths[0]) for _, paths in held for path in paths[1:]}
