"""Where the weight of each layer lies in a torch model: in a module of its own, or as a part of another's parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from slimkit import bridge, kinds
from slimkit.core.sparse.experts import UNCLEAR, Fused, fused
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.skipped import adapter_parts, other_matrices

import torch

PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class WeightSlot:
    """Where the weight and the bias of a layer lie.

    Args:
        module: path of the module that holds the parameters.
        kind: the core's word for the layer.
        key: the weight's name in that module.
        index: None for the whole parameter, a number for one expert of it, a slice for some of its rows.
        bias_key: the bias's name in that module, None without bias.
        bias_index: the same for the bias.
        read: the weight is read without a call of the module, so only products with it show its inputs.
        learn: the layout was guessed; inputs would show.
    """

    module: str
    kind: str
    key: str = "weight"
    index: int | slice | None = None
    bias_key: str | None = "bias"
    bias_index: int | slice | None = None
    read: bool = False
    learn: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """Which parameter holds the weight: the path it is found at, and its name there."""
        return self.module, self.key

    def owner(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module that holds the parameters."""
        return bridge.get_module(model, self.module)

    def caller(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose call uses the weight: attention reads the weight of its output layer itself."""
        child = self.read and self.key == "weight" and self.index is None
        return bridge.get_module(model, self.module.rpartition(".")[0] if child else self.module)

    def weight(self, model: torch.nn.Module) -> torch.Tensor:
        """The layer's weight, detached: a view of the parameter."""
        parameter = self.owner(model)._parameters[self.key]
        assert parameter is not None  # slots are made from parameters that are there
        return parameter.detach() if self.index is None else parameter.detach()[self.index]

    def bias(self, model: torch.nn.Module) -> torch.Tensor | None:
        """The layer's bias, detached, or None."""
        parameter = self.owner(model)._parameters.get(self.bias_key) if self.bias_key else None
        if parameter is None:
            return None
        return parameter.detach() if self.bias_index is None else parameter.detach()[self.bias_index]

    def inside(self, path: str) -> WeightSlot:
        """The same slot seen from the module at `path`."""
        return replace(self, module=self.module[len(path) + 1 :])

    def layer(self, name: str, model: torch.nn.Module) -> SparseLayer:
        """What the core knows of it."""
        module, shape = self.owner(model), tuple(self.weight(model).shape)
        has_bias = self.bias(model) is not None
        if self.kind == "conv2d":
            stride, dilation = tuple(module.stride), tuple(module.dilation)
            return SparseLayer(name, self.kind, shape, module.groups, stride, dilation, has_bias)
        family = f"{self.module}.{self.key}" if isinstance(self.index, int) else ""
        return SparseLayer(name, self.kind, shape, has_bias=has_bias, family=family)


def kind_of(module: torch.nn.Module) -> str | None:
    """The core's word for a module that can be sparse, or None."""
    if kinds.is_ordinary_conv2d(module):
        return "conv2d"
    if kinds.is_kind(module, "linear"):
        return "conv1d" if kinds.is_in_out(module) else "linear"
    return None


def slots_of(model: torch.nn.Module) -> Iterator[tuple[str, WeightSlot]]:
    """Every place of a weight that could be sparse by the layer's name, in the model's order; shared ones come again.

    The layers are Linear, Hugging Face's Conv1D, Conv2d, the query, key and value parts of an attention's fused input
    projection ("attn.in_proj_weight[query]"), and each expert of a parameter with three axes
    ("experts.gate_up_proj[3]").
    """
    read = {id(m.out_proj) for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None:
            yield path, WeightSlot(path, kind, read=id(module) in read)
        elif isinstance(module, torch.nn.MultiheadAttention):
            yield from _projections(path, module)
        else:
            yield from _experts(path, module)


def _projections(path: str, module: torch.nn.MultiheadAttention) -> Iterator[tuple[str, WeightSlot]]:
    stem = f"{path}." if path else ""
    bias = "in_proj_bias" if module.in_proj_bias is not None else None
    for i, part in enumerate(PARTS):
        rows = slice(i * module.embed_dim, (i + 1) * module.embed_dim)
        own = f"{part[0]}_proj_weight"
        if module._parameters.get(own) is not None:
            yield f"{stem}{own}", WeightSlot(path, "linear", own, None, bias, rows, read=True)
        elif module._parameters.get("in_proj_weight") is not None:
            slot = WeightSlot(path, "linear", "in_proj_weight", rows, bias, rows, read=True)
            yield f"{stem}in_proj_weight[{part}]", slot


def _experts(path: str, module: torch.nn.Module) -> Iterator[tuple[str, WeightSlot]]:
    """One slot for each expert of the parameters with three axes of a module that says that it has experts."""
    own, found = module._parameters, _fused(module)
    stem = f"{path}." if path else ""
    for key in found.keys:
        weight = own[key]
        assert weight is not None
        bias = f"{key}_bias" if own.get(f"{key}_bias") is not None else None
        for i in range(weight.shape[0]):
            slot = WeightSlot(path, found.kind, key, i, bias, i, read=True, learn=not found.told)
            yield f"{stem}{key}[{i}]", slot


def _fused(module: torch.nn.Module) -> Fused:
    own = {} if type(module).__module__.startswith("torch.") else module._parameters
    return fused(module, {key: tuple(p.shape) for key, p in own.items() if p is not None})


def described(
    model: torch.nn.Module, with_meta: bool
) -> tuple[dict[str, SparseLayer], dict[str, WeightSlot], dict[str, str]]:
    """The layers that can be sparse, the slots by path, and what cannot be sparse with the reason.

    Args:
        model: the model.
        with_meta: take weights on the meta device too, because they will be loaded.
    """
    found: dict[str, SparseLayer] = {}
    slots: dict[str, WeightSlot] = {}
    skipped: dict[str, str] = {}
    owner: dict[tuple[int, str], str] = {}
    tables = {id(m.weight) for m in model.modules() if kinds.is_table(m)}
    adapters = adapter_parts(dict(model.named_modules(remove_duplicate=False)))
    for name, slot in slots_of(model):
        weight = slot.owner(model)._parameters.get(slot.key)
        place = id(weight), str(slot.index)
        if slot.module in adapters:
            skipped[name] = adapters[slot.module]
        elif weight is None:
            skipped[name] = "its weight is computed, not a parameter"
        elif not weight.is_floating_point():
            skipped[name] = f"its weight is {weight.dtype}, which has no linear algebra"
        elif weight.device.type == "meta" and not with_meta:
            skipped[name] = "its weight is on the meta device"
        elif id(weight) in tables:
            skipped[name] = "its weight is tied to an embedding"
        elif place in owner:
            first = found[owner[place]]
            # A shift of the mean can go to the bias where every layer that has the weight has one.
            has_bias = first.has_bias and slot.bias(model) is not None
            found[first.name] = replace(first, aliases=(*first.aliases, name), has_bias=has_bias)
            slots[name] = slot
        else:
            owner[place] = name
            found[name], slots[name] = slot.layer(name, model), slot
    for path, module in model.named_modules():
        skipped |= {f"{path}.{key}" if path else key: UNCLEAR for key in _fused(module).unclear}
    skipped |= other_matrices(_own_matrices(model, tables), {*found, *slots, *skipped, *adapters, *_parts(slots)})
    return found, slots, skipped


def _parts(slots: Mapping[str, WeightSlot]) -> set[str]:
    """The parameters that hold several layers: fused attention, experts; and attention as a whole."""
    fused = [slot for slot in slots.values() if slot.read]
    return {f"{s.module}.{s.key}" if s.module else s.key for s in fused} | {s.module for s in fused}


def _own_matrices(
    model: torch.nn.Module, tables: set[int]
) -> Iterator[tuple[str, torch.nn.Module, dict[str, tuple[int, ...]]]]:
    """Every module with the shapes of its own floating-point parameters, but tables."""
    for path, module in model.named_modules():
        mine = module._parameters.items()
        own = {k: p for k, p in mine if p is not None and id(p) not in tables}
        yield path, module, {k: tuple(p.shape) for k, p in own.items() if p.is_floating_point()}


def inside(modules: Mapping[str, tuple[str, WeightSlot]], path: str) -> dict[str, tuple[str, WeightSlot]]:
    """Those of the slots that lie in the module at `path`, with paths as seen from there."""
    start = len(path) + 1
    return {p[start:]: (name, s.inside(path)) for p, (name, s) in modules.items() if p.startswith(path + ".")}
