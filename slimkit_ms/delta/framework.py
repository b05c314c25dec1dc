"""The questions about a MindSpore model that putting on and taking off deltas asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.delta.spec import PREFIX, Site
from slimkit.core.freeze import Parameters
from slimkit_ms import bridge, kinds
from slimkit_ms.delta.adapter import AdapterDense
from slimkit_ms.delta.layer import DeltaLayer
from slimkit_ms.delta.lora import LoRADense
from slimkit_ms.delta.lora_layers import LoRAConv2d, LoRAEmbedding, LoRAMintConv2d, LoRAMintEmbedding
from slimkit_ms.delta.low_rank_adapter import LowRankAdapterDense
from slimkit_ms.delta.positions import start_at_zero

from mindspore import mint, nn

# Layer -> the layer that takes its place, and its kind in the core's words.
_LORA: dict[type, tuple[Any, str]] = {
    nn.Dense: (LoRADense, "linear"),
    mint.nn.Linear: (LoRADense, "linear"),
    nn.Embedding: (LoRAEmbedding, "embedding"),
    mint.nn.Embedding: (LoRAMintEmbedding, "embedding"),
    nn.Conv2d: (LoRAConv2d, "conv2d"),
    mint.nn.Conv2d: (LoRAMintConv2d, "conv2d"),
}
_ADAPTERS: dict[str, Any] = {"adapter": AdapterDense, "low_rank_adapter": LowRankAdapterDense}


def kind_of(cell: nn.Cell) -> str:
    """ "linear", "embedding" or "conv2d" for a layer whose mathematics is known, else ""."""
    if isinstance(cell, DeltaLayer):
        return next((kind for layer, kind in _LORA.values() if type(cell) is layer), "linear")
    # A subclass with a construct of its own computes something else: it is not taken for what it derives from.
    return _LORA[_base(cell)][1] if kinds.computes_as_its_kind(cell) and _base(cell) in _LORA else ""


def _base(cell: nn.Cell) -> Any:
    return next((kind for kind in type(cell).__mro__ if kind in _LORA), None)


def weight_of(cell: nn.Cell) -> Any:
    """The weight of a layer, an embedding's table too."""
    return kinds.weight_of(cell) if kinds.is_kind(cell, "embedding") else getattr(cell, "weight", None)


def _site(cell: nn.Cell) -> Site:
    kind, name = kind_of(cell), type(cell).__name__
    if not kind:
        return Site("", (), name, any(p is not None for p in cell._params.values()))
    weight = weight_of(cell)
    reason = ""
    if not weight.is_floating_point():
        reason = f"its weight is {weight.dtype}, not a floating type"
    elif kind == "conv2d" and kinds.groups_of(cell) != 1:
        reason = "it is a grouped convolution"
    elif kind == "conv2d" and kinds.padding_mode_of(cell) != "zeros":
        reason = f"it pads with {kinds.padding_mode_of(cell)}"
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
            return _LORA[_base(module)][0].over(module)
        return _ADAPTERS[kind].over(module, name, dtype, dict(options))

    def is_sparse(self, module: nn.Cell) -> bool:
        weight = weight_of(module).asnumpy()
        return bool((weight == 0).sum() * 10 >= weight.size)

    def parameters(self, model: nn.Cell) -> Parameters:
        return bridge.parameters(model)

    def without_prefix(self, model: nn.Cell) -> None:
        start_at_zero(model)

    def owners(self, model: nn.Cell, parameter: Any) -> int:
        return sum(any(p is parameter for p in c._params.values()) for _, c in model.cells_and_names())


access = MindSporeDelta()
