"""The questions about a torch model that putting on and taking off deltas asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slimkit import bridge
from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import PREFIX, Site
from slimkit.core.freeze import Parameters
from slimkit.delta.adapter import AdapterDense
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.lora import LoRADense
from slimkit.delta.lora_layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding
from slimkit.delta.low_rank_adapter import LowRankAdapterDense
from slimkit.delta.multihead import call_layers, without_call_layers
from slimkit.delta.prefix_model import forget_prefixes

import torch
from torch import nn

_LORA: dict[str, Any] = {
    "linear": LoRADense,
    "embedding": LoRAEmbedding,
    "conv2d": LoRAConv2d,
    "conv1d": LoRAConv1D,
}
_ADAPTERS: dict[str, Any] = {"adapter": AdapterDense, "low_rank_adapter": LowRankAdapterDense}
# A subclass with a forward of its own computes something else: it is not taken for what it derives from.
_PLAIN = ((nn.Linear, "linear"), (nn.Embedding, "embedding"), (nn.Conv2d, "conv2d"))


def kind_of(module: nn.Module) -> str:
    """ "linear", "embedding", "conv2d" or "conv1d" for a layer whose mathematics is known, else ""."""
    if isinstance(module, DeltaLayer):
        return next((kind for kind, layer in _LORA.items() if type(module) is layer), "linear")
    for base, kind in _PLAIN:
        if isinstance(module, base) and type(module).forward is base.forward:
            return kind
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return ""


def _site(module: nn.Module, parent: nn.Module) -> Site:
    kind = kind_of(module)
    weight = getattr(module, "weight", None)
    name = type(module).__name__
    if not kind or not isinstance(weight, torch.Tensor):
        return Site("", (), name, any(p is not None for p in module._parameters.values()))
    shape = tuple(weight.shape)
    reason = ""
    if isinstance(weight, nn.UninitializedParameter):
        return Site("", (), name, True, "it has no weight yet; run the model once")
    if isinstance(parent, nn.MultiheadAttention):
        reason = "nn.MultiheadAttention reads its weight and never calls it"
    elif not weight.is_floating_point():
        reason = f"its weight is {weight.dtype}, not a floating type"
    elif isinstance(module, nn.Conv2d) and module.groups != 1:
        reason = "it is a grouped convolution"
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        reason = "it renormalises its table (max_norm)"
    if kind in ("conv1d", "embedding"):
        shape = shape[::-1]
    return Site(kind, (shape[0], int(weight.numel() // max(shape[0], 1))), name, True, reason)


class TorchDelta(DeltaFramework):
    """The torch wing's answers."""

    def sites(self, model: nn.Module) -> dict[str, Site]:
        modules = dict(model.named_modules(remove_duplicate=False))
        head = self._head(model)
        found = {}
        for path, module in modules.items():
            if not path or PREFIX in path:
                continue
            site = _site(module, modules[path.rpartition(".")[0]])
            found[path] = replace(site, head=True) if module is head else site
        return found

    def _head(self, model: nn.Module) -> nn.Module | None:
        ask = getattr(model, "get_output_embeddings", None)
        return ask() if callable(ask) else None

    def layers(self, model: nn.Module) -> dict[str, Any]:
        return {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, DeltaLayer)}

    def module(self, model: nn.Module, path: str) -> nn.Module:
        return bridge.get_module(model, path)

    def put(self, model: nn.Module, modules: Mapping[str, Any]) -> None:
        layer: Any
        for path, layer in modules.items():
            bridge.set_module(model, path, layer)
        call_layers(model, modules)

    def make(self, kind: str, module: nn.Module, name: str, dtype: Any, options: Mapping[str, Any]) -> Any:
        if kind == "lora":
            return _LORA[kind_of(module)].over(module)
        return _ADAPTERS[kind].over(module, name, dtype, dict(options))

    def is_sparse(self, module: nn.Module) -> bool:
        weight = module.weight
        if not isinstance(weight, torch.Tensor) or weight.is_meta:
            return False
        return bool((weight == 0).sum() * 10 >= weight.numel())

    def parameters(self, model: nn.Module) -> Parameters:
        return bridge.parameters(model)

    def owners(self, model: nn.Module, parameter: Any) -> int:
        return sum(any(p is parameter for p in m._parameters.values()) for m in model.modules())

    def settle(self, model: nn.Module) -> None:
        without_call_layers(model)

    def without_prefix(self, model: nn.Module) -> None:
        forget_prefixes(model)


access = TorchDelta()
