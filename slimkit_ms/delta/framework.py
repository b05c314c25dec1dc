"""The questions about a MindSpore model that putting on and taking off deltas asks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import PREFIX, Site
from slimkit.core.freeze import Parameters
from slimkit_ms import bridge, kinds
from slimkit_ms.delta import starts
from slimkit_ms.delta.adapter import AdaptedLinear, adapter_for
from slimkit_ms.delta.attach import DeltaLayer, attach
from slimkit_ms.delta.held_base import HeldLora
from slimkit_ms.delta.ia3 import Factors, Scaled
from slimkit_ms.delta.layer import Adapted
from slimkit_ms.delta.lora_layers import LoraConv2d, LoraDense, LoraEmbedding, LoraLinear, LoraMintConv2d, LoraTable
from slimkit_ms.delta.low_rank_adapter import LowRankAdaptedLinear, low_rank_adapter_for
from slimkit_ms.delta.miss import ShardSum, SharedMatrix
from slimkit_ms.delta.named import LoraLayer
from slimkit_ms.delta.positions import shift_positions, start_at_zero
from slimkit_ms.delta.shira import Entries, EntryValues

import mindspore as ms
from mindspore import mint, nn

# Layer -> what goes before its class for LoRA, and its kind in the core's words.
_LORA: dict[type, tuple[type[LoraLayer], str]] = {
    nn.Dense: (LoraDense, "linear"),
    mint.nn.Linear: (LoraLinear, "linear"),
    nn.Embedding: (LoraEmbedding, "embedding"),
    mint.nn.Embedding: (LoraTable, "embedding"),
    nn.Conv2d: (LoraConv2d, "conv2d"),
    mint.nn.Conv2d: (LoraMintConv2d, "conv2d"),
}
_ADAPTERS: dict[str, tuple[type[Adapted], Any]] = {
    "adapter": (AdaptedLinear, adapter_for),
    "low_rank_adapter": (LowRankAdaptedLinear, low_rank_adapter_for),
    "ia3": (Scaled, Factors),
    "miss": (ShardSum, SharedMatrix),
    "shira": (Entries, EntryValues),
}


def kind_of(cell: nn.Cell) -> str:
    """ "linear", "embedding" or "conv2d" for a layer whose mathematics is known, else ""."""
    base = next((kind for kind in type(cell).__mro__ if kind in _LORA), None)
    if isinstance(cell, DeltaLayer):
        return "" if base is None else _LORA[base][1]
    # A subclass with a construct of its own computes something else: it is not taken for what it derives from.
    return _LORA[base][1] if base is not None and kinds.computes_as_its_kind(cell) else ""


def weight_of(cell: nn.Cell) -> Any:
    """The weight of a layer, an embedding's table too."""
    return kinds.weight_of(cell) if kinds.is_kind(cell, "embedding") else getattr(cell, "weight", None)


def _site(cell: nn.Cell) -> Site:
    kind, name = kind_of(cell), type(cell).__name__
    if not kind:
        is_linear = kinds.is_kind(cell, "linear")
        reason = f"{name} is a dense layer with a construct of its own; what it computes is not known"
        return Site("", (), name, any(p is not None for p in cell._params.values()), reason if is_linear else "")
    weight = weight_of(cell)
    reason = ""
    if "construct" in vars(cell):
        reason = "its construct was replaced on the object; what it computes is not known"
    elif not weight.is_floating_point():
        reason = f"its weight is {weight.dtype}, not a floating type"
    elif kind == "conv2d" and kinds.groups_of(cell) != 1:
        reason = "it is a grouped convolution"
    elif kind == "conv2d" and kinds.padding_mode_of(cell) != "zeros":
        reason = f"it pads with {kinds.padding_mode_of(cell)}"
    elif kind == "embedding" and vars(cell).get("max_norm") is not None:
        reason = "it renormalises its table (max_norm)"
    shape = tuple(weight.shape[::-1] if kind == "embedding" else weight.shape)
    return Site(kind, (shape[0], int(weight.size // max(shape[0], 1))), name, True, reason)


def _walk(cell: nn.Cell, path: str = "") -> Iterator[tuple[str, nn.Cell]]:
    """Every path with its cell; unlike cells_and_names, a shared cell comes under each of its paths."""
    yield path, cell
    for name, child in cell._cells.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name)


class MindSporeDelta(DeltaFramework):
    """The MindSpore wing's answers."""

    def sites(self, model: nn.Cell) -> dict[str, Site]:
        heads = _heads(model)
        found = {p: (c, _site(c)) for p, c in _walk(model) if p and PREFIX not in p}
        return {p: replace(site, head=True) if id(c) in heads else site for p, (c, site) in found.items()}

    def layers(self, model: nn.Cell) -> dict[str, Any]:
        return {p: c for p, c in _walk(model) if isinstance(c, DeltaLayer)}

    def module(self, model: nn.Cell, path: str) -> nn.Cell:
        for part in path.split(".") if path else ():
            model = model._cells[part]
        return model

    def attach(self, kind: str, module: nn.Cell, name: str, dtype: Any, options: Mapping[str, Any]) -> None:
        if kind == "lora":
            held = options.get("base_dtype")
            base = next(kind for kind in type(module).__mro__ if kind in _LORA)
            layer = attach(module, HeldLora if held else _LORA[base][0])
            layer.start()
            if held:
                layer.hold(held)
            return
        mixin, make = _ADAPTERS[kind]
        adapter = make(mixin.width_for(module, options), dtype or ms.float32, **options).set_train(module.training)
        layer = attach(module, mixin)
        layer.insert_child_to_cell(f"{PREFIX}{kind}", adapter)
        layer.carry_delta(dict(options), name)

    def attached(self, model: nn.Cell, paths: Sequence[str]) -> None:
        for path in paths:
            for name, parameter in self.module(model, path).parameters_and_names():
                if PREFIX in name and not parameter.name.endswith(f".{name}"):
                    parameter.name = f"{path}.{name}"
        bridge.forget_graphs(model)

    def activated(self, model: nn.Cell) -> None:
        layers = self.layers(model).values()
        shift_positions(model, any(layer.delta_acts for layer in layers if layer.delta_kind == "prefix"))

    def keeps_zeros(self, module: nn.Cell) -> bool:
        return bridge.has_made_zeros(module)

    def exchange(self, parameter: Any, value: Any) -> Any:
        before = ms.Tensor(bridge.as_numpy(parameter), parameter.dtype)
        if value is not None:
            parameter.set_data(value)
        return before

    def holdable(self, module: nn.Cell) -> bool:
        return module._params.get("weight") is not None

    def gradients(self, model: nn.Cell, paths: Sequence[str], batches: Sequence[Any], loss: Any) -> Any:
        return starts.gradients(model, {p: self.module(model, p) for p in paths}, batches, loss)

    def given(self, model: nn.Cell, paths: Sequence[str], batches: Sequence[Any], seen: Any, loss: Any = None) -> None:
        starts.given(model, {p: self.module(model, p) for p in paths}, batches, seen, loss)

    def holders(self, model: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
        return ((path, cell) for path, cell in model.cells_and_names() if PREFIX not in path)

    def own_parameters(self, module: nn.Cell) -> dict[str, Any]:
        return {k: p for k, p in module._params.items() if p is not None and PREFIX not in k}

    def changed(self, model: nn.Cell) -> None:
        bridge.forget_graphs(model)

    def parameters(self, model: nn.Cell) -> Parameters:
        return bridge.parameters(model)

    def without_prefix(self, model: nn.Cell) -> None:
        start_at_zero(model)

    def owners(self, model: nn.Cell, parameters: Sequence[Any]) -> list[int]:
        counts: Counter[int] = Counter()
        for _, cell in model.cells_and_names():
            counts.update({id(p) for p in cell._params.values()})
        return [counts[id(p)] for p in parameters]


def _heads(model: nn.Cell) -> set[int]:
    """The output embeddings of every model with Hugging Face's face that this is, or that it holds."""
    found = set()
    for _, cell in model.cells_and_names():
        ask = getattr(type(cell), "get_output_embeddings", None)  # a library's method, that other models lack
        if ask is not None:
            with contextlib.suppress(NotImplementedError):  # its way to say that it has none
                found.add(id(ask(cell)))
    return found


access = MindSporeDelta()
