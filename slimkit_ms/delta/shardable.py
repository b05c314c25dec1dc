"""Activations built from primitives that take a strategy, where MindSpore's own cells have none."""

from __future__ import annotations

from typing import Any

from slimkit_ms import bridge

from mindspore import nn, ops

__all__ = ["Gelu", "LeakyRelu", "Silu", "Softmin", "Tanhshrink", "bridge"]


class Gelu(nn.Cell):
    """GELU by its tanh approximation."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = ops.GeLU()

    def construct(self, x: Any) -> Any:
        return self.gelu(x)


class Silu(nn.Cell):
    """x * sigmoid(x)."""

    pairs = ("mul",)

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.mul = ops.Sigmoid(), ops.Mul()

    def construct(self, x: Any) -> Any:
        return self.mul(x, self.sigmoid(x))


class LeakyRelu(nn.Cell):
    """The larger of x and 0.2 x."""

    scalars = ("mul",)
    pairs = ("maximum",)

    def __init__(self) -> None:
        super().__init__()
        self.mul, self.maximum = ops.Mul(), ops.Maximum()

    def construct(self, x: Any) -> Any:
        return self.maximum(self.mul(x, 0.2), x)


class Softmin(nn.Cell):
    """Softmax of -x over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.neg, self.softmax = ops.Neg(), ops.Softmax(-1)

    def construct(self, x: Any) -> Any:
        return self.softmax(self.neg(x))


class Tanhshrink(nn.Cell):
    """x - tanh(x)."""

    pairs = ("sub",)

    def __init__(self) -> None:
        super().__init__()
        self.tanh, self.sub = ops.Tanh(), ops.Sub()

    def construct(self, x: Any) -> Any:
        return self.sub(x, self.tanh(x))
