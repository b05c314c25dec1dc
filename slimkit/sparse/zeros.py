"""Keeping zeros at zero while a torch model goes on training, whatever optimizer moves it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.core.showing import Shown
from slimkit.core.sparse.masks import kept_masks
from slimkit.core.sparse.skipped import adapter_parts
from slimkit.sharded import at_rest, is_distributed, is_managed, like_parts_of, own_part, whole
from slimkit.sparse.slots import WeightSlot, slots_of

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook  # torch.optim itself hides this module


class FrozenZeros(Shown):
    """A handle on zeros that stay; as a context manager it lets them go at its end.

    Args:
        model: the model that the layers belong to.
        layers: layer name -> where its weight is.
        masks: layer name -> boolean tensor, True where the entry may change.

    Attributes:
        masks: layer name -> boolean tensor, True where the entry may change.
    """

    def __init__(
        self, model: torch.nn.Module, layers: Mapping[str, WeightSlot], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.masks = dict(masks)
        self._pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._places: list[tuple[torch.nn.Module, str]] = []  # where each weight is
        self._recorded: list[torch.nn.Module] = []  # layers whose zeros count as made while this holds them
        callers: list[torch.nn.Module] = []  # whose call uses each of them
        for slot, drop in _drops(model, layers, masks):
            weight = slot.owner(model)._parameters[slot.key]
            assert weight is not None  # slots are made from parameters that are there
            self._pairs.append((weight, drop))
            self._places.append((slot.owner(model), slot.key))
            callers.append(slot.caller(model))
            if not bridge.has_made_zeros(slot.owner(model)):
                bridge.record_zeros(slot.owner(model))
                self._recorded.append(slot.owner(model))
        self._handles = self._hooks()
        for index, caller in enumerate(callers):
            # The hook holds this handle, so the zeros stay for as long as the layer lives, and in copies of it.
            self._handles.append(caller.register_forward_pre_hook(partial(_before_forward, self, index)))
        self.apply()

    def _hooks(self) -> list[Any]:
        """The hooks that a copy of the model does not take along: on gradients, and on whatever optimizer steps."""
        handles: list[Any] = []
        for index in range(len(self._pairs)):
            handles += self._on_gradient(index)
        handles.append(register_optimizer_step_post_hook(partial(_after_step, weakref.ref(self))))
        return handles

    def _on_gradient(self, index: int) -> list[Any]:
        """The hook on a weight's gradient: an optimizer's moments would remember what the zeros wanted to become."""
        weight = self._pairs[index][0]
        if not weight.requires_grad:
            return []
        if is_distributed(weight):  # FSDP puts the gradient there itself, and then calls these hooks alone
            return [weight.register_post_accumulate_grad_hook(partial(_masked_part, self._pairs, index))]
        return [weight.register_hook(partial(_masked, self._pairs, index))]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle of the model keeps; hooks on tensors and optimizers are made anew."""
        held = {"masks": self.masks, "pairs": self._pairs, "recorded": self._recorded, "places": self._places}
        return {**held, "active": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.masks, self._pairs, self._recorded = state["masks"], state["pairs"], state["recorded"]
        self._places = state["places"]
        self._handles = self._hooks() if state["active"] else []

    def apply(self) -> None:
        """Set the entries to zero again, in place: for weights changed by hand, such as a merged delta."""
        for index in range(len(self._pairs)):
            self._apply_one(index)

    def _apply_one(self, index: int) -> None:
        self._follow(index)
        weight, drop = self._pairs[index]
        if drop.device != weight.device:
            drop = drop.to(weight.device)
            self._pairs[index] = (weight, drop)
        with torch.no_grad():
            part = own_part(weight)
            # Writing bumps the version that a pending backward checks, so nothing is written that is zero already.
            if bool(part.masked_select(drop).any()):
                part.masked_fill_(drop, 0)

    def _follow(self, index: int) -> None:
        """Hold the parameter that is in the weight's place now: `assign=True` and others put new ones there."""
        weight, drop = self._pairs[index]
        owner, key = self._places[index]
        now = owner._parameters.get(key)
        # FSDP puts the gathered weight there for each call of the module.
        if now is None or now is weight or is_managed(owner) or now.shape != weight.shape:
            return
        self._pairs[index] = now, drop
        self._handles += self._on_gradient(index)

    def _check(self, index: int) -> None:
        if is_managed(self._places[index][0]) and not is_distributed(self._pairs[index][0]):
            raise UnsupportedError(
                "zeros were frozen before fully_shard, which puts new parameters in the places of those that hold "
                "them: call freeze_zeros afterwards"
            )

    def remove(self) -> None:
        """Let the zeros go: from here on they train like any other entry."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._recorded:
            bridge.forget_zeros(module)
        self._recorded.clear()

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _drops(
    model: torch.nn.Module, layers: Mapping[str, WeightSlot], masks: Mapping[str, torch.Tensor]
) -> list[tuple[WeightSlot, torch.Tensor]]:
    """For each parameter a slot of it, and which of its entries the masks of its parts drop."""
    found: dict[tuple[str, str], tuple[WeightSlot, torch.Tensor]] = {}
    for name, mask in masks.items():
        slot = layers[name]
        if (slot.module, slot.key) not in found:
            weight = slot.owner(model)._parameters[slot.key]
            assert weight is not None
            found[slot.module, slot.key] = slot, torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        drop = found[slot.module, slot.key][1]
        (drop if slot.index is None else drop[slot.index]).copy_(~mask)
    return [(slot, _part_of(slot.owner(model)._parameters[slot.key], drop)) for slot, drop in found.values()]


def _part_of(weight: Any, drop: torch.Tensor) -> torch.Tensor:
    """The entries of those that this process holds of a weight."""
    return own_part(like_parts_of(torch.empty_like(weight, dtype=torch.bool), drop)) if is_distributed(weight) else drop


def _masked(pairs: list[tuple[torch.Tensor, torch.Tensor]], index: int, grad: torch.Tensor) -> torch.Tensor:
    return grad.masked_fill(pairs[index][1].to(grad.device), 0)


def _masked_part(pairs: list[tuple[torch.Tensor, torch.Tensor]], index: int, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    part = own_part(weight.grad)
    part.masked_fill_(pairs[index][1].to(part.device), 0)


def _before_forward(zeros: FrozenZeros, index: int, *_: Any) -> None:
    if zeros._handles:  # a copy's own hook stays on its module
        zeros._check(index)
        zeros._apply_one(index)


def _after_step(zeros: weakref.ReferenceType[FrozenZeros], *_: Any) -> None:
    alive = zeros()
    if alive is not None and alive._handles:
        alive.apply()


def freeze_zeros(
    model: torch.nn.Module,
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

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data[0, 0].zero_()
        >>> freeze_zeros(torch.nn.Sequential(layer)).masks["0"].tolist()
        [[False, True]]
    """
    bridge.check_model(model)
    at_rest(model)
    slots, places = {}, set()
    adapters = adapter_parts(dict(model.named_modules(remove_duplicate=False)))  # whose zeros are how they begin
    for name, slot in slots_of(model):
        if slot.module in adapters:
            continue
        place = id(slot.owner(model)), slot.key, str(slot.index)
        if place not in places and isinstance(slot.owner(model)._parameters.get(slot.key), torch.nn.Parameter):
            places.add(place)
            slots[name] = slot
    shapes = {name: tuple(slot.weight(model).shape) for name, slot in slots.items()}
    nonzero = lambda n: whole(slots[n].weight(model)) != 0
    given = lambda n, mask: torch.as_tensor(mask, device=slots[n].weight(model).device).bool()
    found = kept_masks(shapes, masks, targets, nonzero, given)
    return FrozenZeros(model, slots, found)
