"""Plans as msModelSlim writes them, one mask a layer, read as slimkit's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core.errors import PlanError
from slimkit.core.naming import torch_name
from slimkit.core.prune.plan import FORMAT, VERSION

_SIDES = {"input", "output"}


def is_masks(desc: Any) -> bool:
    """Whether a desc is msModelSlim's: layer -> {"input" or "output": [number kept, mask of "-" and "x"]}.

    Example:
        >>> is_masks({"conv1": {"output": [2, "-x-"]}}), is_masks({"format": "slimkit.prune"})
        (True, False)
    """
    return (
        isinstance(desc, dict)
        and bool(desc)
        and all(isinstance(v, dict) and v and set(v) <= _SIDES for v in desc.values())
    )


def desc_of_masks(
    masks: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], framework: str
) -> dict[str, Any]:
    """The same plan in slimkit's form.

    A layer's "output" mask cuts the first axis of its weight, and its bias; the "input" mask the second one of a weight
    (of a grouped convolution: the channels in a group), or all that a norm holds.

    Args:
        masks: msModelSlim's desc.
        shapes: parameters and buffers of the model that it was made for.
        framework: "torch" or "mindspore".

    Returns:
        A desc.

    Raises:
        PlanError: a layer is missing, or a mask does not fit it.

    Example:
        >>> desc = desc_of_masks({"fc": {"output": [2, "-x-"]}}, {"fc.weight": (3, 4), "fc.bias": (3,)}, "torch")
        >>> desc["axes"]["fc.weight"], desc["variables"]["d0"]["keep"]
        (['d0', 4], [0, 2])
    """
    paths = {torch_name(path): path for path in shapes}
    variables: dict[str, dict[str, Any]] = {}
    known: dict[str, str] = {}
    axes: dict[str, list[Any]] = {}

    def cut(path: str, axis: int, mask: str) -> None:
        exprs = axes.setdefault(path, list(shapes[path]))
        if len(mask) != shapes[path][axis]:
            raise PlanError(
                f"desc was made for a model whose {path!r} has {len(mask)} indices on axis {axis}, and this one's has "
                f"{shapes[path][axis]}"
            )
        if "x" in mask:
            name = known.setdefault(mask, f"d{len(known)}")
            variables[name] = {"size": len(mask), "keep": [k for k, c in enumerate(mask) if c == "-"]}
            exprs[axis] = name

    for layer, sides in masks.items():
        weight, bias = paths.get(f"{layer}.weight"), paths.get(f"{layer}.bias")
        norm = [paths[p] for leaf in ("running_mean", "running_var") if (p := f"{layer}.{leaf}") in paths]
        if weight is None and not norm:
            raise PlanError(f"desc was made for a model with a layer {layer!r}, and this model has none with weights")
        for side, told in sides.items():
            mask = _mask(layer, side, told)
            if weight is not None and len(shapes[weight]) > 1:
                cut(weight, 0 if side == "output" else 1, mask)
                if side == "output" and bias is not None:
                    cut(bias, 0, mask)
            else:
                for path in (weight, bias, *norm):
                    if path is not None:
                        cut(path, 0, mask)
    return {
        "format": FORMAT,
        "version": VERSION,
        "shapes": {p: list(s) for p, s in shapes.items()},
        "variables": variables,
        "axes": {p: e for p, e in axes.items() if any(isinstance(x, str) for x in e)},
        "groups": {},
        "attributes": {},
        "config": {},
        "made": {"framework": framework, "from": "msModelSlim"},
    }


def _mask(layer: str, side: str, told: Any) -> str:
    try:
        number, marks = told
        mask = "".join(marks)
        sound = not set(mask) - {"-", "x"} and mask.count("-") == number and number > 0
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise PlanError(
            f"desc must say [number kept, a mask of that many '-' among 'x'] for the {side} of {layer!r}. "
            f"Received: {told!r}"
        )
    return mask
