"""Keeping zeros at zero while a MindSpore cell goes on training, in PyNative and in compiled graphs alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from slimkit.core.errors import UnsupportedError
from slimkit.core.showing import Shown
from slimkit.core.source.masked_reads import masked_methods
from slimkit.core.sparse.masks import kept_masks
from slimkit.core.sparse.skipped import adapter_parts
from slimkit_ms import bridge, kinds
from slimkit_ms.attention import PrunedMultiheadAttention
from slimkit_ms.sparse.slots import WeightSlot, slots_of

import mindspore as ms
from mindspore import nn, ops


class Masked(nn.Cell):
    """An operator whose weight is masked on the way in, so that dropped entries neither act nor get gradients."""

    def __init__(self, operator: Any, mask: ms.Tensor) -> None:
        super().__init__()
        self.operator = operator
        self.mask = mask

    def construct(self, x: ms.Tensor, weight: ms.Tensor, *rest: Any) -> ms.Tensor:
        """Run the operator on the masked weight."""
        return self.operator(x, weight * self.mask, *rest)


class MaskedAttention(PrunedMultiheadAttention):
    """Attention whose weights are masked on the way in; an attention becomes one, and is itself again afterwards."""

    def project(self, x: Any, part: int) -> Any:
        """Queries, keys or values by the masked part of the weight that makes them."""
        n = self.num_heads * self.head_dim
        if self.in_proj_weight is not None:
            weight = (self.in_proj_weight * self.in_proj_mask)[part * n : (part + 1) * n]
        elif part == 0:
            weight = self.q_proj_weight * self.q_proj_mask
        elif part == 1:
            weight = self.k_proj_weight * self.k_proj_mask
        else:
            weight = self.v_proj_weight * self.v_proj_mask
        y = ops.matmul(x, weight.swapaxes(0, 1))
        if self.in_proj_bias is not None:
            y = y + self.in_proj_bias[part * n : (part + 1) * n]
        return y

    def put_out(self, mixed: Any) -> Any:
        """The output projection with its weight masked."""
        y = ops.matmul(mixed, (self.out_proj.weight * self.out_proj_mask).swapaxes(0, 1))
        if self.out_proj.bias is not None:
            y = y + self.out_proj.bias
        return y


class FrozenZeros(Shown):
    """A handle on zeros that stay; as a context manager it lets them go at its end.

    Hooks have no effect in compiled graphs, so the mask is part of each layer's forward: a zero gets no gradient, and
    an optimizer leaves it where it is.

    Args:
        model: the model that the layers belong to.
        layers: layer name -> where its weight is.
        masks: layer name -> boolean array, True where the entry may change.

    Attributes:
        masks: layer name -> boolean array, True where the entry may change.
    """

    def __init__(self, model: nn.Cell, layers: Mapping[str, WeightSlot], masks: Mapping[str, Any]) -> None:
        self.masks = dict(masks)
        self._model = model
        self._drops: list[tuple[ms.Parameter, ms.Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        for slot, mask in _whole_masks(model, layers, masks):
            keep = ms.Tensor(mask).astype(slot.parameter(model).dtype)
            self._drops.append((slot.parameter(model), keep))
            cell = bridge.get_module(model, slot.caller)
            owner = bridge.get_module(model, slot.cell)
            if not bridge.has_made_zeros(owner):
                bridge.record_zeros(owner)
                self._undo.append(partial(bridge.forget_zeros, owner))
            if slot.read:
                self._undo.append(_mask_reads(cell, slot.key, keep))
            else:
                self._undo.append(_mask_attention(cell, slot, keep) if slot.part else _mask_operator(cell, keep))
        self.apply()
        bridge.forget_graphs(model)

    def apply(self) -> None:
        """Set the entries to zero again, in place: for weights changed by hand, such as a merged delta."""
        for weight, keep in self._drops:
            weight.set_data(weight.value() * keep)

    def remove(self) -> None:
        """Let the zeros go: from here on they train like any other entry."""
        self.apply()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._drops.clear()
        bridge.forget_graphs(self._model)

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _whole_masks(
    model: nn.Cell, layers: Mapping[str, WeightSlot], masks: Mapping[str, Any]
) -> list[tuple[WeightSlot, np.ndarray[Any, Any]]]:
    """For each parameter a slot of it, and the masks of its parts in one array."""
    found: dict[tuple[str, str], tuple[WeightSlot, np.ndarray[Any, Any]]] = {}
    for name, mask in masks.items():
        slot = layers[name]
        if (slot.cell, slot.key) not in found:
            found[slot.cell, slot.key] = slot, np.ones(slot.parameter(model).shape, bool)
        whole = found[slot.cell, slot.key][1]
        whole[slice(None) if slot.index is None else slot.index] = np.asarray(mask, bool)
    return list(found.values())


def _mask_operator(cell: nn.Cell, keep: ms.Tensor) -> Callable[[], None]:
    """Mask the weight of a layer on its way into the operator; the function returned undoes it."""
    kind = kinds.kind_of(cell)
    assert kind is not None
    name = kind.operator
    operator = getattr(cell, name)

    def put(value: Any) -> None:
        delattr(cell, name)
        setattr(cell, name, value)

    put(Masked(operator, keep))
    return lambda: put(operator)


def _mask_attention(cell: nn.MultiheadAttention, slot: WeightSlot, keep: ms.Tensor) -> Callable[[], None]:
    """Mask a weight that attention reads itself; the function returned undoes it."""
    name = "out_proj_mask" if slot.part == "out" else slot.key.replace("weight", "mask")
    kind, masks = type(cell), ("in_proj_mask", "q_proj_mask", "k_proj_mask", "v_proj_mask", "out_proj_mask")
    if kind is not MaskedAttention:
        # Its parameters keep their names this way, which a cell around it would change.
        cell.__class__ = MaskedAttention
        for mask in masks:
            setattr(cell, mask, ms.Tensor(1, keep.dtype))
    setattr(cell, name, keep)

    def undo() -> None:
        if kind is not MaskedAttention:  # the first of its weights to be masked, which is undone last
            cell.__class__ = kind
            for mask in masks:
                delattr(cell, mask)

    return undo


def _mask_reads(cell: nn.Cell, key: str, keep: ms.Tensor) -> Callable[[], None]:
    """Mask a parameter wherever the cell's own code reads it; the function returned undoes it."""
    kind, mask = type(cell), f"{key}_mask"
    methods = masked_methods(kind, key, mask, "mindspore")
    setattr(cell, mask, keep)
    cell.__class__ = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})

    def undo() -> None:
        cell.__class__ = kind
        delattr(cell, mask)

    return undo


def freeze_zeros(
    model: nn.Cell,
    masks: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] | None = None,
) -> FrozenZeros:
    """Keep the zeros of a model's layers at zero through further training with any optimizer, in place.

    Args:
        model: a sparse model.
        masks: layer name -> boolean array, True where the weight may change, as `Compressor.masks` gives it; None
            takes every entry that is exactly zero now.
        targets: globs (or "re:...") of layers; None takes every layer that `Compressor` can make sparse and that has
            zeros.

    Returns:
        A handle with `remove()` and `apply()`, usable as a context manager.

    Raises:
        PatternError: a target matches no layer.
        ArgumentError: no layer has a zero, or a mask's name or shape does not fit.
        UnsupportedError: a layer of attention that is a subclass of nn.MultiheadAttention, or experts whose cell does
            not read them itself in plain methods.

    Example:
        >>> layer = nn.Dense(2, 1)
        >>> _ = layer.weight.set_data(ms.Tensor([[0.0, 1.0]]))
        >>> freeze_zeros(nn.SequentialCell(layer)).masks["0"].tolist()
        [[False, True]]
    """
    bridge.check_model(model)
    adapters = adapter_parts(dict(model.cells_and_names()))  # whose zeros are how they begin
    layers = {name: slot for name, slot in slots_of(model) if slot.cell not in adapters}
    shapes = {name: slot.layer(name, model).shape for name, slot in layers.items()}
    nonzero = lambda n: layers[n].weight(model) != 0
    found = kept_masks(shapes, masks, targets, nonzero, lambda _, mask: np.asarray(mask, dtype=bool))
    for name in found:
        cell = bridge.get_module(model, layers[name].caller)
        if layers[name].part and type(cell) not in (nn.MultiheadAttention, PrunedMultiheadAttention, MaskedAttention):
            raise UnsupportedError(
                f"freeze_zeros cannot mask the weights that {type(cell).__name__} reads for {name!r}: it is a subclass "
                "of nn.MultiheadAttention with a construct of its own; leave it out of `targets` or `masks`."
            )
        if layers[name].read:
            try:
                masked_methods(type(cell), layers[name].key, f"{layers[name].key}_mask", "mindspore")
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"freeze_zeros cannot mask {name!r}: {error}; leave it out of `targets` or `masks`."
                ) from None
    return FrozenZeros(model, layers, found)
