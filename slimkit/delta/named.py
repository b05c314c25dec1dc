"""Named LoRAs on one torch layer: their tensors, and what they add to the weight."""

from __future__ import annotations

import math
from typing import Any

from slimkit import bridge
from slimkit.core.delta import rest
from slimkit.core.delta.named import LORA_BOOK, MergingFace, NamedLoras, Part
from slimkit.core.delta.rest import PARTS
from slimkit.core.delta.spec import LoraSpec, key
from slimkit.core.errors import UnsupportedError
from slimkit.delta import initial
from slimkit.delta.attach import DeltaLayer, device_for
from slimkit.delta.fused import computing
from slimkit.sharded import beside, in_step, whole

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["LoraLayer", "MergingLayer", "bridge"]


class MergingLayer(MergingFace, DeltaLayer):
    """A layer with a weight that deltas can be merged into: its tensors."""

    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def refuse_absent(self) -> None:
        """Refuse to merge into a weight that has no values here."""
        if self.weight.is_meta:
            raise UnsupportedError("the weight is not in memory (meta device, or offloaded); merge where it is.")

    def copy_weight(self) -> torch.Tensor:
        """A copy of the weight that shares nothing with it."""
        return self.copy_of(self.weight)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that shares nothing with it."""
        return tensor.detach().clone()

    def sample_of(self, tensor: torch.Tensor) -> list[float]:
        """Some 64 of a tensor's values; none of a distributed one, of which this process holds a part."""
        if bridge.is_distributed(tensor):
            return []
        flat = tensor.detach().reshape(-1)
        found: list[float] = flat[:: max(1, len(flat) // 64)].float().cpu().tolist()
        return found

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite a tensor's values, in place."""
        with torch.no_grad():
            tensor.copy_(value)

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of: itself, or what it is computed from."""
        if (held := self._parameters.get("weight")) is not None:
            return {"weight": held}
        if self._is_parametrized():
            return dict(self.parametrizations["weight"].named_parameters())
        return {n: p for n, p in self._parameters.items() if n.startswith("weight_")}

    def write_weight(self, value: torch.Tensor) -> None:
        """Give the weight these values, in place, through what it is made of."""
        sources = MergingLayer.sources(self)
        with torch.no_grad():
            if "weight" in sources:
                self.write(sources["weight"], value)
                return
            if self._is_parametrized():
                try:
                    self.weight = value  # each parametrisation is asked for its inverse
                except (NotImplementedError, RuntimeError, ValueError) as error:
                    raise UnsupportedError(f"the weight is parametrised and cannot be set: {error}") from error
                got = self.weight
            elif list(sources) == ["weight_orig"] and "weight_mask" in self._buffers:
                sources["weight_orig"] += value - self.weight
                got = sources["weight_orig"] * self._buffers["weight_mask"]
                vars(self)["weight"] = got
            else:
                got = None
        # float32: the inverse and back takes a few roundings, of numbers of the weight's own size
        if got is None or not torch.allclose(
            got.float(), value.float(), rtol=1e-4, atol=1e-5 * float(value.abs().max())
        ):
            raise UnsupportedError(
                f"the weight is computed from {', '.join(sources) or 'other tensors'}, which cannot be made to give "
                f"the merged one; take what computes it off first."
            )

    def _is_parametrized(self) -> bool:
        return parametrize.is_parametrized(self, "weight")


class LoraLayer(NamedLoras, MergingLayer):
    """Named LoRAs on one layer with a weight."""

    word = "LoRA"

    @property
    def delta_acts(self) -> bool:
        """Whether a run of the layer differs from the plain layer's."""
        return bool(self._running)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The weight's type."""
        found: torch.dtype = self.weight.dtype
        return found

    def add(
        self, name: str, spec: LoraSpec, dtype: torch.dtype | None = None, *, fresh: bool = True, start: Any = None
    ) -> None:
        """Add a delta that changes nothing yet, in place, and make it active.

        Args:
            name: its name.
            spec: its rank, scale and start.
            dtype: of its parameters; None means float32, or float64 over a float64 base.
            fresh: whether to compute its start; not needed when values are filled in afterwards.
            start: rows that a begins with, (at most rank, inputs); None for those of its spec alone.

        Raises:
            UnsupportedError: its start is read from the weight, and the weight is not in memory.
        """
        weight = self.weight.detach()
        place = device_for(self)
        if (spec.dora or (fresh and spec.init == "pissa")) and weight.is_meta and place.type != "meta":
            raise UnsupportedError("dora and pissa start from the weight, which is not in memory (offloaded).")
        kind = dtype or (weight.dtype if weight.dtype == torch.float64 else torch.float32)
        a_shape, b_shape = self.shapes(spec.rank)
        a, b = (torch.zeros(s, dtype=kind, device=place) for s in (a_shape, b_shape))
        if fresh and not a.is_meta:
            self.fill_start(a, b, spec)
            if start is not None:
                a[: len(start)] = torch.from_numpy(start)
        # A compressed delta is made, not trained; its halves have few bits.
        made: dict[str, Any] = {n: nn.Parameter(t, requires_grad=not spec.rest) for n, t in (("a", a), ("b", b))}
        if spec.dora:
            made["magnitude"] = nn.Parameter(self._lengths(whole(weight).float()).to(kind))
        if spec.bias:
            made["bias"] = nn.Parameter(torch.zeros(b_shape[0], dtype=kind, device=place))
        if spec.rest and bridge.is_distributed(weight):
            raise UnsupportedError("compressed deltas go on whole weights; put them on before the model is sharded.")
        in_step(weight, made.values())
        for part, parameter in made.items():
            setattr(self, key("lora", part, name), parameter)
        if spec.init == "pissa":
            self._buffer(key("lora", "a0", name), a.clone())
            self._buffer(key("lora", "b0", name), b.clone())
        for part, (shape, word) in rest.shapes(spec.rest, tuple(weight.shape)).items():
            empty = torch.zeros(shape, dtype=getattr(torch, word), device=place)
            self._buffer(key("lora", part, name), empty)
        self.take(name, spec)

    def fill_start(self, a: torch.Tensor, b: torch.Tensor, spec: LoraSpec) -> None:
        """Give a and b their values to start from, in place; both are zero."""
        if spec.init == "gaussian":
            a.normal_(0, 1 / spec.rank)
        elif spec.init == "pissa":
            self._principal(a, b, spec)
        else:
            initial.kaiming(a)

    def leave(self) -> None:
        """Take every delta off, in place."""
        for name in list(self.delta_specs):
            self.drop_delta(name)
        for attribute in LORA_BOOK:
            vars(self).pop(attribute, None)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with every active delta in it, in the weight's dtype; computed in float32 or wider."""
        self.refuse_absent()
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        base = self.weight.to(kind)
        total = base
        for part in self.active_parts():
            total = total + self.change(part, base)
        return (total.clone() if total is self.weight else total).to(self.weight.dtype)

    def change(self, part: Part, base: torch.Tensor) -> torch.Tensor:
        """What one delta adds to the base weight, in the weight's layout."""
        spec, weight = self.delta_specs[part.name], self.active_deltas[part.name]
        a, b = self._factors(part)
        a, b = (beside(t.to(base.device, base.dtype), base) for t in (a, b))
        delta = self.product(a, b)
        if spec.keep_zeros:
            return part.scale * delta * (base != 0)
        if not spec.dora:
            return part.scale * delta + self.rest(part, base) if spec.rest else part.scale * delta
        turned = base + spec.scaling * delta
        length = beside(getattr(self, key("lora", "magnitude", part.name)).to(base.device, base.dtype), base)
        return weight * (self._per_output(length / self._lengths(turned)) * turned - base)

    def rest(self, part: Part, like: torch.Tensor) -> torch.Tensor:
        """What a compressed delta adds beside its low rank, in the weight's layout; where and as `like` is."""
        shape, weight = tuple(self.weight.shape), self.active_deltas[part.name]
        signs, scale = (getattr(self, key("lora", p, part.name)) for p in PARTS["signs"])
        return weight * signed(signs, scale, shape).to(like).view(shape)

    def own_bias(self, part: Part, like: torch.Tensor) -> torch.Tensor | None:
        """(outputs,) that a LoRA's b adds by itself, where and as `like` is; None where it has none."""
        if not self.delta_specs[part.name].bias:
            return None
        return getattr(self, key("lora", "bias", part.name)).to(like)

    def _turned(self, part: Part, plain: torch.Tensor, side: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """What DoRA adds to a plain layer's output without bias: gain (plain + side) - plain, times the weight."""
        weight = self.active_deltas[part.name]
        return weight * ((gain - 1) * plain.to(gain.dtype) + gain * (side / weight))

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        # DoRA holds the length constant (Liu et al. 2024, sec. 4.3), so no gradient passes here.
        return torch.linalg.vector_norm(weight.detach(), dim=1)

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(1)

    def _factors(self, part: Part, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = getattr(self, part.a), getattr(self, part.b)
        kind = computing(self.weight_dtype, a.dtype)
        a, b = a.to(kind), b.to(kind)
        if self.delta_specs[part.name].init == "pissa":
            # What PiSSA took out of the base is subtracted here, so the base itself is never touched.
            a = torch.cat((a, getattr(self, key("lora", "a0", part.name)).to(kind)), 0)
            b = torch.cat((b, -getattr(self, key("lora", "b0", part.name)).to(kind)), 1)
        return (a, b) if device is None else (a.to(device), b.to(device))

    def _principal(self, a: torch.Tensor, b: torch.Tensor, spec: LoraSpec) -> None:
        """PiSSA's start: scaling * b @ a is the best rank-r approximation of the weight (Meng et al. 2024, sec. 3)."""
        u, s, vt = torch.linalg.svd(whole(self._matrix()).float(), full_matrices=False)
        root = (s[: spec.rank] / spec.scaling).sqrt()
        b.copy_(u[:, : spec.rank] * root)
        a.copy_(root.unsqueeze(1) * vt[: spec.rank])

    def _matrix(self) -> torch.Tensor:
        return self.weight.detach()

    def _buffer(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.words()}"  # type: ignore[misc]


def signed(signs: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(..., columns) of float32: packed signs of rows of a weight of that shape, times each row's scale."""
    table = torch.from_numpy(rest.sign_table()).to(signs.device)
    rows = table[signs.int()].flatten(-2)[..., : math.prod(shape[1:])]
    return rows * scale.unsqueeze(-1)
