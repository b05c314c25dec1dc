"""The questions about a MindSpore model that putting on and taking off deltas asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.spec import PREFIX, Site
from slimkit.core.delta.travel import TravelHands
from slimkit.core.freeze import Entry
from slimkit_ms import bridge
from slimkit_ms.delta.adapter import AdapterDense
from slimkit_ms.delta.layer import DeltaLayer
from slimkit_ms.delta.lora import LoRADense
from slimkit_ms.delta.lora_layers import LoRAConv2d, LoRAEmbedding
from slimkit_ms.delta.low_rank_adapter import LowRankAdapterDense
from slimkit_ms.delta.prefix import PrefixEncoder
from slimkit_ms.delta.prefix_model import sizes_by_config
from slimkit_ms.delta.prompt import PromptTuning

import mindspore as ms
from mindspore import nn

_LORA: dict[str, Any] = {"linear": LoRADense, "embedding": LoRAEmbedding, "conv2d": LoRAConv2d}
_ADAPTERS: dict[str, Any] = {"adapter": AdapterDense, "low_rank_adapter": LowRankAdapterDense}
# A subclass with a construct of its own computes something else: it is not taken for what it derives from.
_PLAIN = ((nn.Dense, "linear"), (nn.Embedding, "embedding"), (nn.Conv2d, "conv2d"))
# MindSpore's parameter -> the same in torch
_TORCH_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "embedding_table": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_RENAMED = (nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.layer.normalization._BatchNorm)


def kind_of(cell: nn.Cell) -> str:
    """ "linear", "embedding" or "conv2d" for a layer whose mathematics is known, else ""."""
    if isinstance(cell, DeltaLayer):
        return next((kind for kind, layer in _LORA.items() if type(cell) is layer), "linear")
    for base, kind in _PLAIN:
        if isinstance(cell, base) and type(cell).construct is base.construct:
            return kind
    return ""


def _weight(cell: nn.Cell) -> Any:
    return cell.embedding_table if isinstance(cell, nn.Embedding) else getattr(cell, "weight", None)


def _site(cell: nn.Cell) -> Site:
    kind, name = kind_of(cell), type(cell).__name__
    if not kind:
        return Site("", (), name, any(p is not None for p in cell._params.values()))
    weight = _weight(cell)
    reason = ""
    if not weight.is_floating_point():
        reason = f"its weight is {weight.dtype}, not a floating type"
    elif isinstance(cell, nn.Conv2d) and cell.group != 1:
        reason = "it is a grouped convolution"
    shape = tuple(weight.shape[::-1] if kind == "embedding" else weight.shape)
    return Site(kind, (shape[0], int(weight.size // max(shape[0], 1))), name, True, reason)


def _walk(cell: nn.Cell, path: str = "") -> Iterator[tuple[str, nn.Cell]]:
    """Every path with its cell; unlike cells_and_names, a shared cell comes under each of its paths."""
    yield path, cell
    for name, child in cell._cells.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name)


class MindSporeHands(TravelHands):
    """The MindSpore wing's answers."""

    def sites(self, model: nn.Cell) -> dict[str, Site]:
        return {p: _site(c) for p, c in _walk(model) if p and PREFIX not in p}

    def layers(self, model: nn.Cell) -> dict[str, Any]:
        return {p: c for p, c in _walk(model) if isinstance(c, DeltaLayer)}

    def module(self, model: nn.Cell, path: str) -> nn.Cell:
        for part in path.split(".") if path else ():
            model = model._cells[part]
        return model

    def put(self, model: nn.Cell, modules: Mapping[str, Any]) -> None:
        cells = dict(_walk(model))
        for path, cell in modules.items():
            parent_path, _, child = path.rpartition(".")
            parent = cells[parent_path]
            # Setting the attribute would write the parent's name in front of every parameter's once more.
            parent._cells[child] = cell
            if isinstance(parent, nn.SequentialCell):
                parent.cell_list = list(parent._cells.values())
            for name, parameter in cell.parameters_and_names():
                if PREFIX in name and not parameter.name.endswith(f".{name}"):
                    parameter.name = f"{path}.{name}"
        bridge.forget_graphs(model)

    def changed(self, model: nn.Cell) -> None:
        bridge.forget_graphs(model)

    def make(self, kind: str, module: nn.Cell, name: str, dtype: Any, options: Mapping[str, Any]) -> Any:
        if kind == "lora":
            return _LORA[kind_of(module)].over(module)
        return _ADAPTERS[kind].over(module, name, dtype, dict(options))

    def is_sparse(self, module: nn.Cell) -> bool:
        weight = _weight(module).asnumpy()
        return bool((weight == 0).sum() * 10 >= weight.size)

    def entries(self, model: nn.Cell) -> list[tuple[Any, Entry]]:
        return bridge.parameter_entries(model)

    def owners(self, model: nn.Cell, parameter: Any) -> int:
        return sum(any(p is parameter for p in c._params.values()) for _, c in model.cells_and_names())

    def value(self, tensor: Any) -> Any:
        if tensor.dtype == ms.bfloat16:
            tensor = tensor.astype(ms.float32)
        return bridge.as_numpy(tensor)

    def fill(self, tensor: Any, value: Any) -> None:
        if isinstance(tensor, ms.Parameter):
            tensor.set_data(ms.Tensor(value, tensor.dtype))
        else:
            tensor.assign_value(ms.Tensor(value, tensor.dtype))

    def sample(self, tensor: Any) -> Any:
        if isinstance(tensor, np.ndarray):
            return tensor.reshape(-1)[sample_places(tensor.size)].astype(np.float32)
        flat = self.value(tensor).reshape(-1)
        return flat[sample_places(flat.size)].astype(np.float32)

    def weight(self, model: nn.Cell, path: str) -> Any:
        cell = self.module(model, path)
        merged = getattr(cell, "unmerged", None)
        return _weight(cell) if merged is None else merged

    def neutral(self, model: nn.Cell) -> dict[str, Any]:
        found = {}
        for prefix, cell in model.cells_and_names():
            for key, parameter in cell._params.items():
                if parameter is not None:
                    name = _TORCH_NAMES.get(key, key) if isinstance(cell, _RENAMED) else key
                    found[f"{prefix}.{name}" if prefix else name] = parameter
        return found

    def prefix_sizes(self, model: nn.Cell, config: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
        return sizes_by_config(model, int(config.get("num_attention_heads") or 1), int(config.get("token_dim") or 1))

    def prefix_rows(self, model: nn.Cell, layers: Sequence[Any]) -> list[tuple[Any, Any]]:
        with bridge.evaluating(model), bridge.pynative():
            return [tuple(map(self.value, layer.rows())) for layer in layers]

    def tables(self, model: nn.Cell, kind: str) -> list[Any]:
        found: list[Any] = []
        for module in (c for _, c in model.cells_and_names()):
            if kind == "prefix" and isinstance(module, PrefixEncoder) and not module.prefix_projection:
                found.append(module.mindpet_delta_ptuning2_embedding.embedding_table)
            if kind == "prompt" and isinstance(module, PromptTuning) and not isinstance(module, DeltaLayer):
                found.append(module.mindpet_delta_prompttuning_embedding.embedding_table)
        return found

    def table_facts(self, model: nn.Cell, kind: str) -> dict[str, Any]:
        for module in (c for _, c in model.cells_and_names()):
            if kind == "prefix" and isinstance(module, PrefixEncoder):
                width = module.num_heads * module.kv_channels
                facts = {"num_layers": module.num_layers, "num_attention_heads": module.num_heads, "token_dim": width}
                return {**facts, "encoder_hidden_size": width}
            if kind == "prompt" and isinstance(module, PromptTuning):
                return {"token_dim": module.token_dim, "num_layers": 1, "num_attention_heads": 1}
        return {}

    def may_train(self, tensor: Any) -> bool:
        return "moving_" not in tensor.name

    def apply_kind(self, model: nn.Cell, kind: str, targets: list[str] | None, **options: Any) -> Any:
        from slimkit_ms.delta.inject import apply_delta

        return apply_delta(model, kind, targets, **options)


hands = MindSporeHands()
