"""Named LoRAs on one layer with a weight: adding, choosing, merging, taking away."""

from __future__ import annotations

from typing import Any, NamedTuple

from slimkit import bridge
from slimkit.core.delta import LoraSpec, key
from slimkit.core.errors import ArgumentError
from slimkit.delta import initial
from slimkit.delta.layer import DeltaLayer

import torch
from torch import nn

__all__ = ["LoraLayer", "Part", "bridge"]


PARTS = ("a", "b", "magnitude", "a0", "b0")


class Part(NamedTuple):
    """One active delta as forward reads it: attribute names, and the scale with its weight in it."""

    name: str
    a: str
    b: str
    scale: float
    dropout: float


class LoraLayer(DeltaLayer):
    """Named LoRAs on one layer with a weight: adding, choosing, merging, taking away."""

    delta_kind = "lora"
    weight: Any
    training: bool

    def start(self) -> None:
        """Begin without any delta."""
        self.specs: dict[str, LoraSpec] = {}
        self.active: dict[str, float] = {}
        self.unmerged: torch.Tensor | None = None
        self._refresh()

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        raise AttributeError

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a in the layout of the weight."""
        raise AttributeError

    def add(self, name: str, spec: LoraSpec, dtype: torch.dtype | None = None, *, fresh: bool = True) -> None:
        """Add a delta that changes nothing yet, in place, and let it speak.

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
            setattr(self, key("lora", "magnitude", name), nn.Parameter(self.row_norm().to(kind)))
        self.specs[name] = spec
        self.active[name] = 1.0
        self._refresh()

    def drop(self, name: str) -> None:
        """Take a delta away, in place."""
        for part in self.parts(name):
            delattr(self, part)
        del self.specs[name]
        self.active.pop(name, None)
        self._refresh()

    def parts(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Attribute -> tensor of everything one delta consists of, the attributes as for a delta named `spelled`."""
        parts = [p for p in PARTS if hasattr(self, key("lora", p, name))]
        return {key("lora", p, spelled or name): getattr(self, key("lora", p, name)) for p in parts}

    def describe(self, name: str) -> dict[str, Any]:
        """One delta's options as plain values."""
        return self.specs[name].to_dict()

    def set_active(self, weights: dict[str, float]) -> None:
        """Let these deltas speak, each times its weight, and no other, in place."""
        self.active = {n: w for n, w in weights.items() if n in self.specs}
        self._refresh()

    def merge(self) -> None:
        """Add the active deltas to the weight, in place; a copy of the weight is kept for `unmerge`."""
        if self.unmerged is not None:
            raise ArgumentError("the deltas of this layer are merged already")
        with torch.no_grad():
            merged = self.merged_weight()
            self.unmerged = self.weight.detach().clone()
            self.weight.copy_(merged)
        self._refresh()

    def unmerge(self) -> None:
        """Put back the weight as it was, bit for bit, in place."""
        if self.unmerged is None:
            raise ArgumentError("the deltas of this layer are not merged")
        with torch.no_grad():
            self.weight.copy_(self.unmerged)
        self.unmerged = None
        self._refresh()

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with every active delta in it, in the weight's dtype; computed in float32 or wider."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        base = self.weight.to(kind)
        total = base.clone()
        for part in self._active_parts:
            total += self.change(part, base)
        return total.to(self.weight.dtype)

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

    def row_norm(self) -> torch.Tensor:
        """Length of each output's weight: DoRA's magnitudes at the start."""
        return self._lengths(self.weight.detach().float())

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight, dim=1)

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

    def _refresh(self) -> None:
        """Work out once what forward would otherwise ask on every call."""
        self._active_parts = tuple(
            Part(n, key("lora", "a", n), key("lora", "b", n), self.specs[n].scaling * w, self.specs[n].dropout)
            for n, w in self.active.items()
            if w != 0
        )
        speaking = self._active_parts if self.unmerged is None else ()
        plain = all(not (s.dora or s.keep_zeros or s.init == "pissa") for s in map(self.specs.get, self.active) if s)
        self._speaking = speaking
        self._only = speaking[0] if len(speaking) == 1 and plain else None

    def extra_repr(self) -> str:
        deltas = ", ".join(f"{n}: rank {s.rank}" for n, s in self.specs.items())
        merged = ", merged" if self.unmerged is not None else ""
        return f"{super().extra_repr()}, lora=({deltas}){merged}"  # type: ignore[misc]
