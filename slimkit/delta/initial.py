"""Initial values and activations by the names of the documents, which are MindSpore's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.delta.layers import ACTIVATIONS, activation_name, check_shape, initializer_name

import torch
from torch import nn
from torch.nn import functional as F

Initial = torch.Tensor | str | float | Callable[[torch.Tensor], Any]

FLOATS = (torch.float16, torch.float32)


def dtype(value: Any, name: str, *, optional: bool = False) -> Any:
    """Refuse a dtype other than float16 and float32 (and None where `optional`), as the documents say."""
    if not (value in FLOATS if isinstance(value, torch.dtype) else optional and value is None):
        check.wrong_type(name, "torch.float16 or torch.float32" + (" or None" if optional else ""), value)
    return value


def kaiming(tensor: torch.Tensor) -> None:
    """He-uniform with negative slope sqrt(5), LoRA's start for its first factor: bounds of 1 / sqrt(in)."""
    bound = 1 / math.sqrt(tensor[0].numel())
    tensor.uniform_(-bound, bound)


def _variance_scaling(tensor: torch.Tensor) -> torch.Tensor:
    """A truncated normal of variance 1 / inputs; the constant is the spread that cutting at two sigma leaves."""
    std = math.sqrt(1 / tensor[0].numel()) / 0.87962566103423978
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


_FILL: dict[str, Callable[[torch.Tensor], Any]] = {
    "zeros": torch.Tensor.zero_,
    "zero": torch.Tensor.zero_,
    "ones": lambda t: t.fill_(1),
    "one": lambda t: t.fill_(1),
    "normal": lambda t: t.normal_(0, 0.01),
    "uniform": lambda t: t.uniform_(-0.07, 0.07),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "he_uniform": nn.init.kaiming_uniform_,
    "he_normal": nn.init.kaiming_normal_,
    "truncated_normal": lambda t: nn.init.trunc_normal_(t, std=0.01, a=-0.02, b=0.02),
    "variance_scaling": _variance_scaling,
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
}


def check_initial(value: Any, name: str, shape: Sequence[int], words: str) -> Any:
    """Refuse an initial value that is no tensor of the shape, known name, number or function."""
    if isinstance(value, torch.Tensor):
        check_shape(value.shape, shape, name, words)
    elif isinstance(value, str):
        initializer_name(value, name)
    elif isinstance(value, bool) or not (isinstance(value, (int, float)) or callable(value)):
        check.wrong_type(name, "a tensor, a str, a number or a function that fills a tensor", value)
    return value


def parameter(value: Any, shape: Sequence[int], kind: torch.dtype) -> nn.Parameter:
    """A parameter of that shape, filled as a checked initial value says."""
    made = torch.empty(tuple(shape), dtype=torch.float32)
    with torch.no_grad():
        if isinstance(value, torch.Tensor):
            made.copy_(value)
        elif isinstance(value, str):
            _FILL[initializer_name(value, "initial value")](made)
        elif callable(value):
            value(made)
        else:
            made.fill_(value)
    return nn.Parameter(made.to(kind))


class FastGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.sigmoid(1.702 * x)


# gelu is MindSpore's default, the tanh approximation, so that one bundle means one function in both wings.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "fast_gelu": FastGELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hswish": nn.Hardswish,
    "hsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leakyrelu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "logsigmoid": nn.LogSigmoid,
    "softmax": lambda: nn.Softmax(dim=-1),
    "logsoftmax": lambda: nn.LogSoftmax(dim=-1),
    "softmin": lambda: nn.Softmin(dim=-1),
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "hshrink": nn.Hardshrink,
    "tanhshrink": nn.Tanhshrink,
    "prelu": nn.PReLU,
}
assert set(_ACTIVATIONS) == set(ACTIVATIONS)


def activation(value: Any, name: str = "activation") -> nn.Module | None:
    """An activation module from its name, from a module, or None.

    Raises:
        ArgumentTypeError: another type.
        ActivationError: an unknown name; also a KeyError.

    Example:
        >>> activation("relu")
        ReLU()
    """
    if value is None or isinstance(value, nn.Module):
        return value
    check.instance(value, str, name, "a str, a torch.nn.Module or None")
    return _ACTIVATIONS[activation_name(value, name)]()
