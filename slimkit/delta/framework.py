"""The questions about a torch model that putting on and taking off deltas asks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit import bridge, kinds
from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import HELD, PREFIX, Site
from slimkit.core.freeze import Parameters
from slimkit.delta import starts
from slimkit.delta.adapter import AdaptedLinear, adapter_for
from slimkit.delta.attach import DeltaLayer, attach, device_for, layer_class
from slimkit.delta.held_base import HeldLora
from slimkit.delta.ia3 import Factors, Scaled
from slimkit.delta.layer import Adapted
from slimkit.delta.lora_held import LoraHeld, held_parameters, rank_limit
from slimkit.delta.lora_layers import LoraConv1D, LoraConv2d, LoraEmbedding, LoraLinear
from slimkit.delta.low_rank_adapter import LowRankAdaptedLinear, low_rank_adapter_for
from slimkit.delta.miss import ShardSum, SharedMatrix
from slimkit.delta.multihead import call_layers, without_call_layers
from slimkit.delta.named import LoraLayer
from slimkit.delta.positions import shift_positions
from slimkit.delta.prefix_model import forget_prefixes
from slimkit.delta.shira import Entries, EntryValues
from slimkit.sharded import at_rest, forget_deltas, in_step

import torch
from torch import nn

_LORA: dict[str, type[LoraLayer]] = {
    "linear": LoraLinear,
    "embedding": LoraEmbedding,
    "conv2d": LoraConv2d,
    "conv1d": LoraConv1D,
    "multihead": LoraHeld,
    "experts": LoraHeld,
}
_ADAPTERS: dict[str, tuple[type[Adapted], Any]] = {
    "adapter": (AdaptedLinear, adapter_for),
    "low_rank_adapter": (LowRankAdaptedLinear, low_rank_adapter_for),
    "ia3": (Scaled, Factors),
    "miss": (ShardSum, SharedMatrix),
    "shira": (Entries, EntryValues),
}


def kind_of(module: nn.Module) -> str:
    """ "linear", "embedding", "conv2d" or "conv1d" for a layer whose mathematics is known, else ""."""
    if isinstance(module, LoraHeld):
        return held_parameters(module)[0]
    if isinstance(module, DeltaLayer):
        known = next((kind for kind, layer in _LORA.items() if isinstance(module, layer)), "")
        return known or _layer_kind(module)
    kind: Any = layer_class(module)
    family = kinds.kind_of(module)
    if family is None:
        return held_parameters(module)[0]
    return _layer_kind(module) if kinds.computes_as_its_kind(module, kind) else ""


def _layer_kind(module: nn.Module) -> str:
    family = kinds.kind_of(module)
    if family is None:
        return ""
    if family.word == "conv":
        return "conv2d" if kinds.is_ordinary_conv2d(module) else ""
    return "conv1d" if family.in_out else family.word if family.word in ("linear", "embedding") else ""


def _site(module: nn.Module, parent: nn.Module) -> Site:
    kind, name = kind_of(module), type(module).__name__
    holds = any(p is not None for p in module._parameters.values())
    if not kind:
        reason = "a linear layer whose forward is not torch's" if isinstance(module, nn.Linear) else ""
        return Site("", (), name, holds, reason and f"{name} is {reason}; what it computes is not known")
    if kind in HELD:
        parameters = held_parameters(module)[1]
        return Site(kind, rank_limit(module, parameters), name, True, parameters=parameters)
    weight: Any = module.weight
    if isinstance(weight, nn.UninitializedParameter):
        return Site("", (), name, True, "it has no weight yet; run the model once")
    shape = tuple(weight.shape)
    reason = ""
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
        modules = dict(bridge.named_modules(model, remove_duplicate=False))
        heads = _heads(model)
        found: dict[str, Site] = {}
        layer = ""
        for path, module in modules.items():
            if not path or PREFIX in path or (layer and path.startswith(layer)):
                continue  # what computes a layer's weight is part of the layer
            layer = f"{path}." if kind_of(module) not in ("", *HELD) else layer
            site = _site(module, modules[path.rpartition(".")[0]])
            found[path] = replace(site, head=True) if id(module) in heads else site
        return found

    def layers(self, model: nn.Module) -> dict[str, Any]:
        return {p: m for p, m in bridge.named_modules(model, remove_duplicate=False) if isinstance(m, DeltaLayer)}

    def module(self, model: nn.Module, path: str) -> nn.Module:
        return bridge.get_module(model, path)

    def attach(self, kind: str, module: nn.Module, name: str, dtype: Any, options: Mapping[str, Any]) -> None:
        if kind == "lora":
            held = options.get("base_dtype")
            layer = attach(module, HeldLora if held else _LORA[kind_of(module)])
            layer.start()
            if held:
                layer.hold(held)
            return
        mixin, make = _ADAPTERS[kind]
        adapter = make(mixin.width_for(module, options), dtype or torch.float32, **options).to(device_for(module))
        in_step(module.weight, adapter.parameters())
        layer = attach(module, mixin)
        setattr(layer, f"{PREFIX}{kind}", adapter.train(module.training))
        layer.carry_delta(dict(options), name)

    def taken_off(self, model: nn.Module) -> None:
        forget_deltas(model)

    def attached(self, model: nn.Module, paths: Sequence[str]) -> None:
        call_layers(model, {path: bridge.get_module(model, path) for path in paths})

    def at_rest(self, model: nn.Module) -> None:
        at_rest(model)

    def activated(self, model: nn.Module) -> None:
        shift_positions(
            model, lambda: any(x.delta_acts for x in self.layers(model).values() if x.delta_kind == "prefix")
        )

    def keeps_zeros(self, module: nn.Module) -> bool:
        return bridge.has_made_zeros(module)

    def exchange(self, parameter: Any, value: Any) -> Any:
        with torch.no_grad():
            if value is None:
                return parameter.detach().clone()
            if type(parameter) is nn.Parameter:
                # The storage changes hands: no copy, and a graph that waits for its backward finds its values again.
                before = parameter.data
                parameter.data = value.to(parameter)
                return before
            before = parameter.detach().clone()
            parameter.copy_(value)
            return before

    def holdable(self, module: nn.Module) -> bool:
        weight: Any = module._parameters.get("weight")
        return type(weight) is nn.Parameter and not weight.is_meta and "forward" not in vars(module)

    def gradients(self, model: nn.Module, paths: Sequence[str], batches: Sequence[Any], loss: Any) -> Any:
        for path, found in starts.gradients(model, {p: bridge.get_module(model, p) for p in paths}, batches, loss):
            yield path, found.T if kind_of(bridge.get_module(model, path)) == "conv1d" else found

    def given(
        self, model: nn.Module, paths: Sequence[str], batches: Sequence[Any], seen: Any, loss: Any = None
    ) -> None:
        starts.given(model, {p: bridge.get_module(model, p) for p in paths}, batches, seen, loss)

    def holders(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        return ((path, module) for path, module in bridge.named_modules(model) if PREFIX not in path)

    def own_parameters(self, module: nn.Module) -> dict[str, Any]:
        return {k: p for k, p in module._parameters.items() if p is not None and PREFIX not in k}

    def parameters(self, model: nn.Module) -> Parameters:
        return bridge.parameters(model)

    def owners(self, model: nn.Module, parameters: Sequence[Any]) -> list[int]:
        counts: Counter[Any] = Counter()
        for module in model.modules():
            counts.update({_memory(p) for p in module._parameters.values() if p is not None})
        return [counts[_memory(p)] for p in parameters]

    def settle(self, model: nn.Module) -> None:
        without_call_layers(model)

    def without_prefix(self, model: nn.Module) -> None:
        forget_prefixes(model)


def _memory(parameter: Any) -> tuple[str, int]:
    """What tells two parameters apart: where their values lie, which ties through a hook of accelerate share."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0
    return ("values at", parameter.data_ptr()) if plain else ("object", id(parameter))


def _heads(model: nn.Module) -> set[int]:
    """The output embeddings of every Hugging Face model that this is, or that it holds."""
    found = set()
    for module in model.modules():
        ask = getattr(type(module), "get_output_embeddings", None)  # a library's method, that other models lack
        if ask is not None:
            with contextlib.suppress(NotImplementedError):  # its way to say that it has none
                found.add(id(ask(module)))
    return found


access = TorchDelta()
