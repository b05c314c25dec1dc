"""Named LoRAs on one torch layer: their tensors, and what they add to the weight."""

from __future__ import annotations

from slimkit import bridge
from slimkit.core.delta.named import NamedLoras, Part
from slimkit.core.delta.spec import LoraSpec, key
from slimkit.delta import initial
from slimkit.delta.layer import DeltaLayer

import torch
from torch import nn

__all__ = ["LoraLayer", "bridge"]


class LoraLayer(NamedLoras, DeltaLayer):
    """Named LoRAs on one layer with a weight."""

    delta_kind = "lora"

    def add(self, name: str, spec: LoraSpec, dtype: torch.dtype | None = None, *, fresh: bool = True) -> None:
        """Add a delta that changes nothing yet, in place, and make it active.

        Args:
            name: its name.
            spec: its rank, scale and start.
            dtype: of its parameters; None means float32, or float64 over a float64 base.
            fresh: whether to compute its start; not needed when values are filled in afterwards.
        """
        kind = dtype or (self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32)
        a_shape, b_shape = self.shapes(spec.rank)
        a, b = (torch.zeros(s, dtype=kind, device=self.weight.device) for s in (a_shape, b_shape))
        if fresh and not a.is_meta:
            if spec.init == "gaussian":
                a.normal_(0, 1 / spec.rank)
            elif spec.init == "pissa":
                self._principal(a, b, spec)
            else:
                initial.kaiming(a)
        if spec.init == "pissa":
            self._buffer(key("lora", "a0", name), a.clone())
            self._buffer(key("lora", "b0", name), b.clone())
        setattr(self, key("lora", "a", name), nn.Parameter(a))
        setattr(self, key("lora", "b", name), nn.Parameter(b))
        if spec.dora:
            length = self._lengths(self.weight.detach().float())
            setattr(self, key("lora", "magnitude", name), nn.Parameter(length.to(kind)))
        self.take(name, spec)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        base = self.weight.to(kind)
        total = base.clone()
        for part in self.active_parts():
            total += self.change(part, base)
        return total.to(self.weight.dtype)

    def copy_weight(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def write_weight(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(value)

    def change(self, part: Part, base: torch.Tensor) -> torch.Tensor:
        """What one delta adds to the base weight, in the weight's layout."""
        spec, weight = self.specs[part.name], self.active[part.name]
        a, b = self._factors(part)
        delta = self.product(a.to(base.dtype), b.to(base.dtype))
        if spec.keep_zeros:
            return part.scale * delta * (base != 0)
        if not spec.dora:
            return part.scale * delta
        turned = base + spec.scaling * delta
        length = getattr(self, key("lora", "magnitude", part.name)).to(base.dtype)
        return weight * (self._per_output(length / self._lengths(turned)) * turned - base)

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        # DoRA holds the length constant (Liu et al. 2024, sec. 4.3), so no gradient passes here.
        return torch.linalg.vector_norm(weight.detach(), dim=1)

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(1)

    def _factors(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = getattr(self, part.a), getattr(self, part.b)
        if self.specs[part.name].init == "pissa":
            # What PiSSA took out of the base is subtracted here, so the base itself is never touched.
            a = torch.cat((a, getattr(self, key("lora", "a0", part.name))), 0)
            b = torch.cat((b, -getattr(self, key("lora", "b0", part.name))), 1)
        return a, b

    def _principal(self, a: torch.Tensor, b: torch.Tensor, spec: LoraSpec) -> None:
        """PiSSA's start: scaling * b @ a is the best rank-r approximation of the weight (Meng et al. 2024, sec. 3)."""
        u, s, vt = torch.linalg.svd(self._matrix().float(), full_matrices=False)
        root = (s[: spec.rank] / spec.scaling).sqrt()
        b.copy_(u[:, : spec.rank] * root)
        a.copy_(root.unsqueeze(1) * vt[: spec.rank])

    def _matrix(self) -> torch.Tensor:
        return self.weight.detach()

    def _buffer(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.words()}"  # type: ignore[misc]
