"""Initial values and activations by the names of the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.delta.layers import ACTIVATIONS, activation_name, check_shape, initializer_name
from slimkit_ms import bridge
from slimkit_ms.delta.shardable import Gelu, LeakyRelu, Silu, Softmin, Tanhshrink

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import HeUniform, Initializer, initializer

__all__ = ["activation", "bridge", "check_initial", "dtype", "kaiming", "parameter"]

FLOATS = (ms.float16, ms.float32)


def dtype(value: Any, name: str, *, optional: bool = False) -> Any:
    """Refuse a dtype other than float16 and float32 (and None where `optional`), as the documents say."""
    if not (any(value is kind for kind in FLOATS) or (optional and value is None)):
        check.wrong_type(name, "mindspore.float16 or mindspore.float32" + (" or None" if optional else ""), value)
    return value


def kaiming() -> Initializer:
    """He-uniform with negative slope sqrt(5), LoRA's start for its first factor: bounds of 1 / sqrt(in)."""
    return HeUniform(negative_slope=math.sqrt(5))


def check_initial(value: Any, name: str, shape: Sequence[int], words: str, *, tensor: bool = True) -> Any:
    """Refuse an initial value that is no tensor of the shape, known name, number or Initializer."""
    if isinstance(value, ms.Tensor) and tensor:
        check_shape(value.shape, shape, name, words)
    elif isinstance(value, str):
        initializer_name(value, name)
    elif isinstance(value, bool) or not (
        isinstance(value, Initializer) or (tensor and isinstance(value, (int, float)))
    ):
        allowed = "a Tensor, a str, an Initializer or a number" if tensor else "a str or an Initializer"
        check.wrong_type(name, allowed, value)
    return value


def parameter(value: Any, shape: Sequence[int], kind: Any, name: str) -> ms.Parameter:
    """A parameter of that shape, filled as a checked initial value says."""
    if isinstance(value, str):
        value = initializer_name(value, name).replace("_", "")  # as the framework's own table has it
    return ms.Parameter(initializer(value, list(shape), kind), name=name)


_ACTIVATIONS: dict[str, Callable[[], nn.Cell]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SeLU,
    "gelu": Gelu,
    "fast_gelu": nn.FastGelu,
    "silu": Silu,
    "mish": nn.Mish,
    "hswish": nn.HSwish,
    "hsigmoid": nn.HSigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leakyrelu": LeakyRelu,
    "leaky_relu": LeakyRelu,
    "logsigmoid": nn.LogSigmoid,
    "softmax": nn.Softmax,
    "logsoftmax": nn.LogSoftmax,
    "softmin": Softmin,
    "softsign": nn.Softsign,
    "softshrink": nn.SoftShrink,
    "hshrink": nn.HShrink,
    "tanhshrink": Tanhshrink,
    "prelu": nn.PReLU,
}
assert set(_ACTIVATIONS) == set(ACTIVATIONS)


def activation(value: Any, name: str = "activation") -> Any:
    """An activation cell from its name, from a cell or primitive, or None.

    Raises:
        ArgumentTypeError: another type.
        ActivationError: an unknown name; also a KeyError.
    """
    if value is None or isinstance(value, (nn.Cell, ops.Primitive)):
        return value
    check.instance(value, str, name, "a str, a mindspore.nn.Cell, a Primitive or None")
    return _ACTIVATIONS[activation_name(value, name)]()
