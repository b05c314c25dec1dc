"""Weight normalisation: a weight g v / |v| whose v loses inputs stays what it was where its length g follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


class Normed(NamedTuple):
    """One weight under weight normalisation: paths of its length g and direction v, and the axis with lengths of its
    own (-1: one length for all)."""

    length: str
    direction: str
    axis: int


def weight_norms(model: nn.Module) -> Iterator[Normed]:
    """Every weight of a model that torch computes as g v / |v|, by either of its two doors."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, steps in getattr(module, "parametrizations", {}).items():
            if len(steps) == 1 and isinstance(steps[0], _WeightNorm):
                start = f"{prefix}parametrizations.{name}.original"
                yield Normed(start + "0", start + "1", steps[0].dim)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield Normed(f"{prefix}{hook.name}_g", f"{prefix}{hook.name}_v", hook.dim)


def lengths(direction: torch.Tensor, axis: int) -> torch.Tensor:
    """|v|, one number for each index of the axis, of the shape that g has.

    Args:
        direction: v.
        axis: the axis with lengths of its own; -1 for one length.
    """
    if axis == -1:
        return direction.norm()
    return direction.norm(dim=[k for k in range(direction.dim()) if k != axis], keepdim=True)


def follow(
    model: nn.Module, found: Mapping[str, torch.Tensor], cut: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What the lengths are to be multiplied with, so that kept weights stay what they are.

    Args:
        model: the uncut model.
        found: its tensors by path.
        cut: path -> a call that selects what is kept of a tensor of that path's shape, for those that are cut.

    Returns:
        Path of g -> factors of the shape of the cut g; empty where only whole rows go.
    """
    factors = {}
    for normed in weight_norms(model):
        if normed.direction not in cut or normed.direction not in found:
            continue
        v = found[normed.direction].detach()
        before, after = lengths(v, normed.axis), lengths(cut[normed.direction](v), normed.axis)
        if normed.length in cut:
            before = cut[normed.length](before)
        if before.shape == after.shape and not torch.equal(before, after):
            factors[normed.length] = torch.where(before > 0, after / before, torch.ones_like(after))
    return factors


def with_zeros(
    model: nn.Module, found: Mapping[str, torch.Tensor], zeros: Mapping[str, Sequence[Any]]
) -> dict[str, torch.Tensor]:
    """Tensors with some indices set to zero; other weights under weight normalisation stay what they are.

    Args:
        model: the model; it stays as it is.
        found: its tensors by path.
        zeros: path -> for each axis the indices to set to zero, as an array, or None.

    Returns:
        Path -> new values, of those that change.
    """
    out: dict[str, torch.Tensor] = {}
    normed = {n.direction: n for n in weight_norms(model)}
    for path, axes in zeros.items():
        values = found[path].detach().clone()
        for axis, index in enumerate(axes):
            # A direction of length zero is no direction: there the length alone is zero.
            if index is not None and not (path in normed and normed[path].axis == axis):
                values.index_fill_(axis, torch.from_numpy(index).to(values.device), 0.0)
        out[path] = values
    for path, weight in normed.items():
        if path in out and weight.length in found:
            old, new = (lengths(t.detach(), weight.axis) for t in (found[path], out[path]))
            length = out.get(weight.length, found[weight.length].detach())
            out[weight.length] = length * torch.where(old > 0, new / old, torch.ones_like(old))
    return out
