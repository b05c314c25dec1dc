"""LoRA on parameters that a module holds and reads itself: `nn.MultiheadAttention`, and experts in one tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from slimkit import bridge
from slimkit.core.delta.peft_held import slug
from slimkit.core.delta.spec import LoraSpec, key
from slimkit.core.errors import UnsupportedError
from slimkit.delta import initial
from slimkit.delta.fused import computing
from slimkit.delta.named import LoraLayer

import torch
from torch import nn

__all__ = ["LoraHeld", "bridge", "held_parameters"]


def held_parameters(module: nn.Module) -> tuple[str, tuple[str, ...]]:
    """The kind ("multihead", "experts") and the parameters of a module that LoRA goes on this way; else "" and none."""
    if isinstance(module, nn.MultiheadAttention):
        fit = module._qkv_same_embed_dim and module.in_proj_weight is not None
        return ("multihead", ("in_proj_weight", "out_proj.weight")) if fit else ("", ())
    own = module._parameters.items()
    stacked = tuple(n for n, p in own if p is not None and p.ndim == 3 and p.is_floating_point() and p.shape[0] > 1)
    return ("experts", stacked) if stacked and not hasattr(module, "weight") else ("", ())


class LoraHeld(LoraLayer):
    """A module with low-rank deltas on parameters that it reads itself: they are in there while it runs.

    A matrix (out, in) gets scaling * b @ a. A stack (experts, out, in), or (experts, in, out) where the module says
    `is_transposed`, gets one such product for each expert; a is (rank * experts, in), b (out, rank * experts), as in
    PEFT.
    """

    @property
    def delta_acts(self) -> bool:
        """Whether a run of the module differs from the plain one's."""
        return bool(self._running)

    def _place(self, parameter: str) -> tuple[nn.Module, str]:
        path, _, attribute = parameter.rpartition(".")
        holder: Any = self
        return (holder.get_submodule(path) if path else holder), attribute

    def _held(self, parameter: str) -> torch.Tensor:
        module, attribute = self._place(parameter)
        return module._parameters[attribute]

    def _sizes(self, parameter: str) -> tuple[int, int, int]:
        """Experts, outputs and inputs."""
        shape = self._held(parameter).shape
        if len(shape) == 2:
            return 1, shape[0], shape[1]
        turned = getattr(self, "is_transposed", False)
        return (shape[0], shape[2], shape[1]) if turned else (shape[0], shape[1], shape[2])

    def shapes(self, rank: int, parameter: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b of one of the parameters; of the first on the module where none is named."""
        named = parameter or next(iter(self.sources()))
        experts, outputs, inputs = self._sizes(named)
        return (rank * experts, inputs), (outputs, rank * experts)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a of each expert, in the layout of a stack."""
        experts = next(t.shape[0] for t in self.sources().values() if t.ndim == 3)
        wide = b.reshape(b.shape[0], -1, experts)  # (out, rank, experts)
        low = a.reshape(experts, -1, a.shape[1])  # (experts, rank, in)
        turned = getattr(self, "is_transposed", False)
        return torch.einsum("ore,eri->eio" if turned else "ore,eri->eoi", wide, low)

    def add(
        self, name: str, spec: LoraSpec, dtype: torch.dtype | None = None, *, fresh: bool = True, start: Any = None
    ) -> None:
        """Add a delta that changes nothing yet, in place, and make it active; see `LoraLayer.add`."""
        for parameter in spec.parameters:
            held = self._held(parameter)
            kind = dtype or (held.dtype if held.dtype == torch.float64 else torch.float32)
            a, b = (torch.zeros(s, dtype=kind, device=held.device) for s in self.shapes(spec.rank, parameter))
            if fresh and not a.is_meta:
                a.normal_(0, 1 / spec.rank) if spec.init == "gaussian" else initial.kaiming(a)
            setattr(self, key("lora", f"a_{slug(parameter)}", name), nn.Parameter(a))
            setattr(self, key("lora", f"b_{slug(parameter)}", name), nn.Parameter(b))
        self.take(name, spec)

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Attribute -> tensor of everything one delta consists of, the attributes as for a delta named `spelled`."""
        parts = [f"{half}_{slug(p)}" for p in self.delta_specs[name].parameters for half in "ab"]
        return {key("lora", p, spelled or name): getattr(self, key("lora", p, name)) for p in parts}

    def _changes(self) -> dict[str, torch.Tensor]:
        """Parameter -> what the active deltas add to it."""
        found: dict[str, torch.Tensor] = {}
        for part in self.active_parts():
            for parameter in self.delta_specs[part.name].parameters:
                held = self._held(parameter)
                a, b = (getattr(self, key("lora", f"{half}_{slug(parameter)}", part.name)) for half in "ab")
                kind = computing(held.dtype, a.dtype)
                a, b = a.to(held.device, kind), b.to(held.device, kind)
                change = (b @ a if held.ndim == 2 else self.product(a, b)) * part.scale
                found[parameter] = change if parameter not in found else found[parameter] + change
        return found

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """Let the parameters have the deltas in them for one run."""
        places = []
        try:
            for parameter, change in self._changes().items():
                module, attribute = self._place(parameter)
                held = module._parameters.pop(attribute)
                places.append((module, attribute, held))
                vars(module)[attribute] = held + change.to(held.dtype)
            yield
        finally:
            for module, attribute, held in places:
                vars(module).pop(attribute, None)
                module._parameters[attribute] = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LoraHeld) or not self._running:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with self._lent():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the deltas are added to."""
        return {p: self._held(p) for spec in self.delta_specs.values() for p in spec.parameters}

    @torch.no_grad()
    def merged_weight(self) -> Any:
        """Name -> parameter with every active delta in it, computed in float32 or wider."""
        if any(t.is_meta for t in self.sources().values()):
            raise UnsupportedError("the weight is not in memory (meta device, or offloaded); merge where it is.")
        merged = {}
        for parameter, change in self._changes().items():
            held = self._held(parameter)
            merged[parameter] = (held.to(torch.promote_types(held.dtype, torch.float32)) + change).to(held.dtype)
        return merged

    def copy_weight(self) -> Any:
        """What `unmerged` holds while the deltas are merged; the copies are beside it."""
        return {}

    def write_weight(self, value: Any) -> None:
        """Give the parameters these values, in place."""
        for parameter, merged in value.items():
            self.write(self._held(parameter), merged)


def rank_limit(module: nn.Module, parameters: tuple[str, ...]) -> tuple[int, int]:
    """Outputs and inputs of the smallest of these parameters, for the rule that a rank is no larger."""
    shapes = [tuple(module.get_parameter(p).shape[-2:]) for p in parameters]
    smallest = min(shapes, key=min)
    return int(smallest[0]), int(smallest[1] if math.prod(smallest) else 0)
