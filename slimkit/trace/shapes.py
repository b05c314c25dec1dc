"""Shapes of the operators whose shape function in torch is slow: it is written in Python, and its imports take
seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)

import torch

# Normalisations, softmax and activations keep their input's shape; some shape functions are written in Python and slow.
_SAME_SHAPE = (
    "native_batch_norm _native_batch_norm_legit_no_training native_layer_norm native_group_norm _softmax "
    "_safe_softmax _log_softmax gelu silu sigmoid relu hardswish hardsigmoid hardtanh relu_ silu_ hardswish_ "
    "hardtanh_ leaky_relu leaky_relu_ tanh rsqrt cos sin exp neg pow clone mish elu"
)
SAME_SHAPE = frozenset(_SAME_SHAPE.split())
# Those among them that return statistics too.
_SEVERAL = "native_batch_norm _native_batch_norm_legit_no_training native_layer_norm native_group_norm"
SEVERAL = frozenset(_SEVERAL.split())
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"})


def keeps_shape(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator's result has the shape of its first argument, a tensor without values."""
    if name not in SAME_SHAPE or args[0].device.type != "meta":
        return False
    # Where a layer norm's written shape is not its input's, torch is to complain.
    return name != "native_layer_norm" or list(args[1]) == list(args[0].shape[-len(args[1]) :])


def quick(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of an operator's result, or None to ask torch.

    Args:
        name: the ATen operator.
        args: its arguments; the first is a tensor without values, whose dtype the result has.
        kwargs: its keyword arguments.

    Returns:
        The shape.
    """
    if name == "cat":
        return _cat(args[0], int(args[1]) if len(args) > 1 else int(kwargs.get("dim", 0)))
    if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
        return None
    if name in _ARITHMETIC:
        return _broadcast(name, args, kwargs)
    if name in ("mm", "bmm", "addmm"):
        return _product(name, args, kwargs)
    if name in ("_adaptive_avg_pool2d", "adaptive_avg_pool2d"):
        return (*args[0].shape[:-2], *args[1])
    if name == "avg_pool2d" and not kwargs and args[0].dim() == 4 and not (len(args) > 4 and args[4]):
        return _windows(args[0], _pairs([*args[:4]]))
    if name == "convolution" and args[0].dim() == args[1].dim() and args[0].shape[1] == _reads(args):
        return _convolution(*args[:9])
    if name == "_grouped_mm" and args[0].dim() == 2 and args[1].dim() == 3 and args[0].shape[1] == args[1].shape[1]:
        # torch's own insists on bfloat16 even where the kernel does not.
        return (args[0].shape[0], args[1].shape[2])
    if name == "mean" and len(args) > 1 and isinstance(args[1], (list, tuple)) and args[1] and not kwargs:
        rank, keep = args[0].dim(), len(args) > 2 and args[2]
        axes = {a % rank for a in args[1]}
        return tuple(1 if k in axes else n for k, n in enumerate(args[0].shape) if keep or k not in axes)
    return None


def max_pool(args: Sequence[Any]) -> tuple[int, ...] | None:
    """The shape of max_pool2d_with_indices's two results, or None to ask torch."""
    x = args[0]
    if x.device.type != "meta" or x.dim() != 4 or (len(args) > 5 and args[5]):
        return None
    return _windows(x, _pairs(args))


def _pairs(args: Sequence[Any]) -> list[list[int]]:
    """Kernel, stride, padding and dilation of a pooling, a number for both axes written twice."""
    kernel = list(args[1]) * (2 // len(args[1]))
    defaults = [kernel, kernel, [0, 0], [1, 1]]
    return [
        list(args[k]) * (2 // len(args[k])) if len(args) > k and args[k] else default
        for k, default in enumerate(defaults, 1)
    ]


def _windows(x: Any, pooling: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """Channels first; None where a window does not fit, which torch is to say."""
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], *pooling)]
    return (*x.shape[:2], *sizes) if min(sizes) > 0 else None


def _product(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    a, b = args[-2:]
    if kwargs or len(args) != (3 if name == "addmm" else 2) or a.dtype != b.dtype or a.shape[-1] != b.shape[-2]:
        return None
    if name == "bmm" and a.shape[0] != b.shape[0]:
        return None
    shape = (*a.shape[:-1], b.shape[-1])
    return shape if name != "addmm" or args[0].shape in (shape, shape[-1:]) else None


def _cat(parts: Sequence[Any], axis: int) -> tuple[int, ...] | None:
    first = parts[0]
    rank = first.dim()
    axis %= max(rank, 1)
    for part in parts:
        meta = part.device.type == "meta" and part.dim() == rank > 0 and part.dtype == first.dtype
        if not meta or any(k != axis and n != first.shape[k] for k, n in enumerate(part.shape)):
            return None
    return (*first.shape[:axis], sum(p.shape[axis] for p in parts), *first.shape[axis + 1 :])


def _reads(args: Sequence[Any]) -> int:
    return int(args[1].shape[0] if args[6] else args[1].shape[1] * args[8])


def _broadcast(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    a, b = args[0], args[1]
    if not a.is_floating_point() or not set(kwargs) <= {"alpha"} or len(args) > 2:
        return None
    if not isinstance(b, torch.Tensor):
        return tuple(a.shape)
    if b.dtype != a.dtype:
        return None
    if a.shape == b.shape:
        return tuple(a.shape)
    wide = list(a.shape) if a.dim() >= b.dim() else list(b.shape)
    short = b.shape if a.dim() >= b.dim() else a.shape
    for k in range(1, len(short) + 1):
        if wide[-k] == 1:
            wide[-k] = short[-k]
        elif short[-k] not in (1, wide[-k]):
            return None  # torch says what is wrong
    if name.endswith("_") and wide != list(a.shape):
        return None
    return tuple(wide)


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[int, ...] | None:
    n_space = x.dim() - 2
    stride, padding, dilation, output_padding = (
        list(v) * (n_space if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding or [0])
    )
    sizes = []
    for k in range(n_space):
        reach = dilation[k] * (weight.shape[k + 2] - 1)
        if transposed:
            sizes.append((x.shape[k + 2] - 1) * stride[k] - 2 * padding[k] + reach + output_padding[k] + 1)
        else:
            sizes.append((x.shape[k + 2] + 2 * padding[k] - reach - 1) // stride[k] + 1)
    if any(s <= 0 for s in sizes):
        return None
    made = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and bias.shape[0] != made:
        return None
    return (x.shape[0], made, *sizes)
