"""Masks by layer name: checked against the layers they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimkit.core import check, match
from slimkit.core.errors import ArgumentError


def demand_masks(
    shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Any] | None, targets: Sequence[str] | None
) -> list[str]:
    """The layers whose zeros are meant, after checking that masks and targets fit the model.

    Args:
        shapes: weight shape of every layer.
        masks: layer -> mask; None for any layer.
        targets: globs over the names; None for all.

    Returns:
        Names in the model's order.

    Raises:
        PatternError: a target matches no layer.
        ArgumentError: a mask's name or shape does not fit, or no layer is left.

    Example:
        >>> demand_masks({"a": (1, 2), "b": (1, 2)}, None, ["b"])
        ['b']
    """
    names = list(shapes)
    if targets is not None:
        found = match.match(names, check.strings(targets, "targets"), whole_modules=True)
        match.demand(found, names, "targets")
        names = list(found.names)
    if masks is not None:
        check.instance(masks, Mapping, "masks", "a dict of layer name -> boolean array")
        for name, mask in masks.items():
            check.choice(name, list(shapes), "a key of masks")
            if tuple(mask.shape) != tuple(shapes[name]):
                check.wrong_value(f"masks[{name!r}]", f"of shape {tuple(shapes[name])}", tuple(mask.shape))
        names = [n for n in names if n in masks]
    if not names:
        raise ArgumentError("model must have a layer with zeros to keep. Received: a model without any")
    return names


def kept_masks(
    shapes: Mapping[str, tuple[int, ...]],
    masks: Mapping[str, Any] | None,
    targets: Sequence[str] | None,
    nonzero: Callable[[str], Any],
    given: Callable[[str, Any], Any],
) -> dict[str, Any]:
    """Layer -> mask of what may change: those given, or else every layer's that has zeros now.

    Args:
        shapes, masks, targets: as for `demand_masks`.
        nonzero: layer -> where its weight is not zero.
        given: (layer, mask of the caller) -> the mask as the framework holds it.
    """
    names = demand_masks(shapes, masks, targets)
    if masks is not None:
        return {n: given(n, masks[n]) for n in names}
    found = {n: m for n in names if not bool((m := nonzero(n)).all())}
    demand_masks(shapes, found, None)
    return found
