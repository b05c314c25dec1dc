"""The LoRA product as one autograd step: the same numbers as three linear calls, with less to keep and less to add."""

from __future__ import annotations

from typing import Any

from slimkit import bridge

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

__all__ = ["bridge", "computing", "dora_linear", "fuses", "lora_linear", "lora_linear_plain"]


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', keeping only x and the rank-wide A x' for the way back.

    What is as thin as the rank is made lying down, (r, n): the same product standing up takes up to four times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = a @ flat.t()  # (r, n)
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(low.t(), b.t(), alpha=scale)  # (n, out)  in place: the side branch never exists by itself
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        shape = grads[0].shape
        g = grads[0].reshape(-1, shape[-1])  # (n, out)
        flat = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            low = a @ flat.t()  # a second derivative is wanted: it must see how this depends on x and a
        g_x = g_weight = g_bias = g_a = g_b = None
        if need_b:
            g_b = (low @ g).t() * ctx.scale  # (out, r)
        if need_x or need_a:
            g_low = (b.t() @ g.t()).mul_(ctx.scale)  # (r, n)
            if need_a:
                g_a = g_low @ flat  # (r, in)
            if need_x:
                g_x = (g @ weight).addmm_(g_low.t(), a).view(*shape[:-1], a.shape[1])  # (n, in)
        if need_weight:
            g_weight = g.t() @ flat
        if need_bias:
            g_bias = g.sum(0)
        return g_x, g_weight, g_bias, g_a, g_b, None


class _LoraSummed(torch.autograd.Function):
    """The same over many tokens: y = x (W + scale B A)' + bias, the sum made anew each way and never kept.

    A pass over the weight costs less than one over the outputs and one over the inputs' gradients once there are more
    tokens than about one side of the weight; measured in tools/bench/delta.py.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        g = grads[0].reshape(-1, grads[0].shape[-1])  # (n, out)
        flat = x.reshape(-1, x.shape[-1])
        g_x = g_weight = g_bias = g_a = g_b = None
        if need_b:
            g_b = ((a @ flat.t()) @ g).t() * ctx.scale  # (out, r)
        if need_a:
            g_a = (b.t() @ g.t()).mul_(ctx.scale) @ flat  # (r, in)
        if need_x:
            g_x = (g @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(*grads[0].shape[:-1], a.shape[1])
        if need_weight:
            g_weight = g.t() @ flat
        if need_bias:
            g_bias = g.sum(0)
        return g_x, g_weight, g_bias, g_a, g_b, None


class _DoraLinear(torch.autograd.Function):
    """y = x (gain (W + scale B A))' + bias with gain = m / |W + scale B A| by rows, the length held constant."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, magnitude: Any, scale: float) -> torch.Tensor:
        turned = torch.addmm(weight, b, a, alpha=scale)  # (out, in)
        length = torch.linalg.vector_norm(turned, dim=1)
        y = F.linear(x, turned.mul_((magnitude / length).unsqueeze(1)), bias)
        ctx.save_for_backward(x, weight, bias, a, b, magnitude, length, y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, weight, bias, a, b, magnitude, length, y = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_magnitude, _ = ctx.needs_input_grad
        g = grads[0].reshape(-1, grads[0].shape[-1])  # (n, out)
        flat, scale = x.reshape(-1, x.shape[-1]), ctx.scale
        gain = (magnitude / length).unsqueeze(1)  # (out, 1)
        again = torch.is_grad_enabled()  # a second derivative must see how things depend on x, a and b
        g_x = g_weight = g_bias = g_a = g_b = g_magnitude = None
        if need_b:
            g_b = ((a @ flat.t()) @ g).t() * (gain * scale)  # (out, r)
        if need_a:
            g_a = ((b * (gain * scale)).t() @ g.t()) @ flat  # (r, in)
        if need_x:
            g_x = (g @ (torch.addmm(weight, b, a, alpha=scale) * gain)).view(*grads[0].shape[:-1], a.shape[1])
        if need_magnitude and again:
            g_magnitude = (g * F.linear(flat, torch.addmm(weight, b, a, alpha=scale))).sum(0) / length
        elif need_magnitude:
            # What one unit of magnitude gives is in y already: (y - bias) / magnitude; a magnitude of 0 hides it.
            dotted = torch.linalg.vecdot(g, y.reshape(g.shape), dim=0)
            dotted = dotted if bias is None else dotted - g.sum(0) * bias
            g_magnitude = dotted / magnitude
            if magnitude.device.type == "cpu" and not bool(magnitude.all()):  # elsewhere to ask is to wait
                g_magnitude = (g * F.linear(flat, torch.addmm(weight, b, a, alpha=scale))).sum(0) / length
        if need_weight:
            g_weight = (g.t() @ flat) * gain
        if need_bias:
            g_bias = g.sum(0)
        return g_x, g_weight, g_bias, g_a, g_b, g_magnitude, None


def lora_linear_plain(x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    """The same in plain calls: for tracing, torch.func, autocast, mixed dtypes and distributed tensors."""
    out = F.linear(x, weight, bias)
    kind = computing(x.dtype, a.dtype)
    side = F.linear(F.linear(x.to(kind), a.to(kind)), b.to(kind)) * scale
    return out + side.to(out.dtype)


def computing(one: torch.dtype, delta: torch.dtype) -> torch.dtype:
    """What a delta is computed in: the wider of its own type and the other's; float8 holds values and computes nothing.

    Example:
        >>> computing(torch.float32, torch.bfloat16)
        torch.float32
    """
    if delta.itemsize == 1 or not one.is_floating_point:
        return one if one.is_floating_point else delta
    return torch.promote_types(one, delta)


def lora_linear(x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    """A linear layer and its LoRA in one step.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        a: (r, in).
        b: (out, r).
        scale: the factor in front of b @ a.

    Returns:
        (..., out): x W' + bias + scale x a' b'.

    Source:
        Hu et al. 2022, "LoRA", section 4.1.

    Example:
        >>> one = torch.ones(1, 1)
        >>> lora_linear(one, one, None, one, one, 2.0).item()
        3.0
    """
    if not fuses(x, weight, a):
        return lora_linear_plain(x, weight, bias, a, b, scale)
    n_out, n_in = weight.shape
    # In halves the sum would lose what is small beside the weight.
    many = x.numel() * (n_in + n_out) > 2 * n_in * n_in * n_out and x.dtype.itemsize >= 4
    step = _LoraSummed if many and not torch.compiler.is_compiling() else _LoraLinear
    return step.apply(x, weight, bias, a, b, scale)


def dora_linear(x: Any, weight: Any, bias: Any, a: Any, b: Any, magnitude: Any, scale: float) -> torch.Tensor:
    """A linear layer and its DoRA in one step; the caller asks `fuses` first.

    Args:
        x: (..., in).
        weight: (out, in), of 32 bits or more.
        bias: (out,) or None.
        a: (r, in).
        b: (out, r).
        magnitude: (out,).
        scale: the factor in front of b @ a.

    Returns:
        (..., out): x (gain (W + scale b a))' + bias with gain = magnitude / |W + scale b a| by rows.

    Source:
        Liu et al. 2024, "DoRA", sections 4.1 and 4.3.

    Example:
        >>> one = torch.ones(1, 1)
        >>> dora_linear(one, one, None, one, one, torch.tensor([5.0]), 2.0).item()
        5.0
    """
    return _DoraLinear.apply(x, weight, bias, a, b, magnitude, scale)


def fuses(x: Any, weight: Any, a: Any) -> bool:
    """Whether one step of autograd may stand for the plain calls."""
    return (
        torch.is_grad_enabled()
        and x.dtype == weight.dtype == a.dtype
        and type(x) is torch.Tensor
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()
        # torch.func and forward-mode derivatives take operators apart themselves.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
