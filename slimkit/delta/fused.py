"""The LoRA product as one autograd step: the same numbers as three linear calls, with less to keep and less to add."""

from __future__ import annotations

from typing import Any

from slimkit import bridge

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

__all__ = ["bridge", "lora_linear", "lora_linear_plain"]


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', keeping only x and the rank-wide x A' for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.t()  # (n, r)
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(low, b.t(), alpha=scale)  # (n, out)  in place: the side branch never exists by itself
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
            low = flat @ a.t()  # a second derivative is wanted: it must see how this depends on x and a
        g_x = g_weight = g_bias = g_a = g_b = None
        if need_b:
            g_b = (low.t() @ g).t() * ctx.scale  # (out, r)
        if need_x or need_a:
            g_low = (g @ b).mul_(ctx.scale)  # (n, r)
            if need_a:
                g_a = g_low.t() @ flat  # (r, in)
            if need_x:
                g_x = (g @ weight).addmm_(g_low, a).view(*shape[:-1], a.shape[1])  # (n, in)
        if need_weight:
            g_weight = g.t() @ flat
        if need_bias:
            g_bias = g.sum(0)
        return g_x, g_weight, g_bias, g_a, g_b, None


def lora_linear_plain(x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    """The same in plain calls: for tracing, torch.func, autocast, mixed dtypes and distributed tensors."""
    out = F.linear(x, weight, bias)
    if a.dtype.itemsize == 1:  # float8 holds values; nothing is computed in it
        a, b = a.to(x.dtype), b.to(x.dtype)
    side = F.linear(F.linear(x.to(a.dtype), a), b) * scale
    return out + side.to(out.dtype)


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
    if (
        not torch.is_grad_enabled()
        or not x.dtype == weight.dtype == a.dtype
        or type(x) is not torch.Tensor
        or torch.is_autocast_enabled(x.device.type)
        or torch.jit.is_tracing()
        # torch.func and forward-mode derivatives take operators apart themselves.
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return lora_linear_plain(x, weight, bias, a, b, scale)
    return _LoraLinear.apply(x, weight, bias, a, b, scale)
