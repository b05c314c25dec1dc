"""A linear layer with LoRA whose own weight is held in int8 or bfloat16."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.held_base import quantised
from slimkit.delta.lora_layers import LoraLinear

import torch
from torch import nn

__all__ = ["HeldLora", "bridge", "held", "restored"]


class _HeldLinear(torch.autograd.Function):
    """y = scale (x q') + bias; the weight is made wide anew each way and never kept, nor is x."""

    @staticmethod
    def forward(ctx: Any, x: Any, numbers: Any, scale: Any, bias: Any) -> torch.Tensor:
        wide, after = _factors(numbers, scale, x.dtype)
        y = x.reshape(-1, x.shape[-1]) @ wide.t()  # (n, out)
        if after is not None:
            y = y.mul_(after)
        ctx.save_for_backward(numbers, scale)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        numbers, scale = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        g_bias = g.sum(0) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, g_bias
        wide, after = _factors(numbers, scale, g.dtype)
        g = g if after is None else (g * after).to(g.dtype)
        return (g @ wide).view(*grads[0].shape[:-1], numbers.shape[1]), None, None, g_bias


def _factors(numbers: Any, scale: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What inputs are multiplied by, in their type, and what the answers are multiplied by then (float32) or None."""
    if scale is None or dtype != torch.float16:
        return numbers.to(dtype), scale
    # Whole numbers up to 127 would lead beyond float16's range, and a gradient times a scale below it.
    return restored(numbers, scale, dtype), None


def held(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight (outputs, inputs) in "int8" or "bfloat16", and the scale of each output or None."""
    if kind != "int8":
        return weight.detach().to(torch.bfloat16), None
    numbers, scales = quantised(weight.detach().float().cpu().numpy())
    return torch.from_numpy(numbers).to(weight.device), torch.from_numpy(scales).to(weight.device)


def restored(numbers: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a layer computes with where its own is held in fewer bits."""
    wide = numbers.detach().float()
    return (wide if scale is None else wide * scale.float().unsqueeze(1)).to(dtype)


class HeldLora(LoraLinear):
    """A linear layer with LoRA; `weight_held` and `weight_scale` stand for its weight until deltas are merged."""

    word = "HeldLoRA"

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with, in the type that it had; made anew unless deltas are merged."""
        plain = self._parameters.get("weight")
        return self._wide() if plain is None else plain

    @property
    def weight_dtype(self) -> torch.dtype:
        """The weight's type, without making one."""
        return self.plain_dtype

    def hold(self, kind: str) -> None:
        """Hold the weight in fewer bits, in place."""
        weight: Any = self._parameters["weight"]
        flat, places = weight.detach().reshape(-1), torch.from_numpy(sample_places(weight.numel()))
        self.plain_sample = flat[places.to(flat.device)].float().cpu().numpy()
        numbers, scale = held(weight, kind)
        self.plain_dtype, self.plain_trains, self.held_kind = weight.dtype, weight.requires_grad, kind
        del self._parameters["weight"]
        self._parameters["weight_held"] = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("weight_scale", scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What is held keeps its types wherever it goes; the weight that comes back has that of the layer's others.
        kept = {n: t.detach() for n in ("weight_held", "weight_scale") if (t := getattr(self, n, None)) is not None}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype
        return self

    @torch.no_grad()
    def _wide(self) -> torch.Tensor:
        return restored(self.weight_held, self.weight_scale, self.plain_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, HeldLora):  # somebody kept this method, and the delta is off
            return type(self).forward(self, input)
        if self.delta_is_merged:
            return super().forward(input)
        kind = input.dtype if input.is_floating_point() else self.plain_dtype
        bias = None if self.bias is None else self.bias.to(kind)
        return self.acted(_HeldLinear.apply(input, self.weight_held, self.weight_scale, bias), input)

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """Any number of deltas, one after the other; none of them reads the weight."""
        return self._with_sides(out, x, out, self.bias)

    def write_weight(self, value: torch.Tensor) -> None:
        """Let the layer have a plain weight with these values, in place; it stands still as long as deltas are on."""
        self._parameters.pop("weight_held", None)
        self._parameters["weight"] = nn.Parameter(value, requires_grad=False)

    def _write_sources(self, values: dict[str, Any]) -> None:
        if "weight_held" not in values:
            super()._write_sources(values)
            return
        self._parameters.pop("weight", None)
        self._parameters["weight_held"] = nn.Parameter(values["weight_held"], requires_grad=False)

    def leave(self) -> None:
        """Take every delta off, in place; the weight stays what the layer computed with, in the type that it had."""
        super().leave()
        if "weight" not in self._parameters:
            self.write_weight(self._wide())
        self._parameters["weight"].requires_grad_(self.plain_trains)
        del self._buffers["weight_scale"]
        for attribute in ("plain_dtype", "plain_trains", "plain_sample", "held_kind"):
            del vars(self)[attribute]
