"""A base held in fewer bits under a delta: int8 with one scale for each output, or bfloat16.

    W is about scale q        q = round(W / scale) in -127..127, scale = max |W| / 127 of an output's row

so that zeros stay zeros. What a layer computes with is scale q from then on: the delta is trained on it, merging adds
to it in the weight's own type and never rounds again, and taking the delta off leaves it.

Source: Dettmers et al. 2023, "QLoRA", section 3 (its place; the grid here is the plain symmetric one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core.delta.spec import LoraSpec, Site
from slimkit.core.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from slimkit.core.delta.framework import DeltaFramework

Array = np.ndarray[Any, Any]

LEVELS = 127


def quantised(weight: Array) -> tuple[Array, Array]:
    """A weight (outputs, inputs) as int8, and the scale of each output (float32).

    Example:
        >>> held, scale = quantised(np.array([[1.0, -2.0], [0.0, 0.0]]))
        >>> held.tolist(), restored(held, scale).tolist()[0][1]
        ([[64, -127], [0, 0]], -2.0)
    """
    wide = np.asarray(weight, np.float32)
    largest = np.abs(wide).max(1, initial=0)
    scale = np.where(largest > 0, largest / LEVELS, 1).astype(np.float32)
    return np.rint(wide / scale[:, None]).clip(-LEVELS, LEVELS).astype(np.int8), scale


def restored(held: Array, scale: Array) -> Array:
    """The weight that a layer computes with, float32."""
    found: Array = held.astype(np.float32) * scale[:, None]
    return found


def kind_of(layer: Any) -> str:
    """What a layer's own weight is held in, or "" where it is whole."""
    return str(vars(layer).get("held_kind") or "")


def inherited(access: DeltaFramework, model: Any, specs: Mapping[str, LoraSpec]) -> dict[str, LoraSpec]:
    """The same LoRAs; one on a base that is held in fewer bits already says so, for its file must hold it alike."""
    standing = access.layers(model)
    return {
        path: spec if spec.base_dtype or path not in standing else replace(spec, base_dtype=kind_of(standing[path]))
        for path, spec in specs.items()
    }


def told(access: DeltaFramework, model: Any, deltas: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A line about deltas of a file that were made over whole weights where the model holds its own in fewer bits."""
    standing = access.layers(model)
    layers = [
        path
        for delta in deltas
        for path, record in delta["layers"].items()
        if path in standing and kind_of(standing[path]) and not record.get("base_dtype")
    ]
    if not layers:
        return ()
    return (
        f"{len(layers)} layers hold their weights in {kind_of(standing[layers[0]])} here, and the delta was made over "
        f"whole ones: outputs differ by what was rounded ({layers[0]} ...)",
    )


def check(access: DeltaFramework, model: Any, sites: Mapping[str, Site], specs: Mapping[str, LoraSpec]) -> None:
    """Refuse what a base in fewer bits is not offered with, before anything is changed.

    Raises:
        UnsupportedError: a layer that is not linear, one whose weight another module holds too, or an option that reads
            the weight on every call.
        ArgumentError: the layer carries a delta over a base that is held otherwise.
    """
    standing = access.layers(model)
    held = [path for path in specs if path in standing and vars(standing[path]).get("held_kind")]
    asked = {path: spec for path, spec in specs.items() if spec.base_dtype or path in held}
    for path, spec in asked.items():
        if sites[path].kind != "linear":
            raise UnsupportedError(f"base_dtype works on linear layers; {path} is a {sites[path].type_name}.")
        if spec.dora or spec.keep_zeros or spec.init == "pissa":
            raise UnsupportedError(f"base_dtype excludes dora, keep_zeros and pissa, which read the weight: {path}.")
        if spec.base_dtype and path in standing and vars(standing[path]).get("held_kind") != spec.base_dtype:
            raise ArgumentError(f"{path} carries a delta already, over a base that is not held in {spec.base_dtype}.")
    fresh = [path for path in asked if path not in standing]
    weights = {path: access.own_parameters(access.module(model, path)).get("weight") for path in fresh}
    for path, weight in weights.items():
        if weight is None or not access.holdable(access.module(model, path)):
            raise UnsupportedError(
                f"base_dtype wants a weight that is whole, in memory and a plain parameter, on a layer with the "
                f"forward of its class; {path} is otherwise."
            )
    for path, owners in zip(weights, access.owners(model, list(weights.values()))):
        if owners > 1:
            raise UnsupportedError(f"the weight of {path} is shared with another module; base_dtype would part them.")
