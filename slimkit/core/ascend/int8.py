"""One int8 layer of the 310P: its five tensors and what the device computes with them.

Of a layer y = W x + b with W (n, k), whose rows are whole multiples of one step each, W = s_w * w, and whose inputs lie
between a low and a high value that calibration has seen, the device computes

    x8 = clip(round(x / s_x + o), -128, 127)          s_x, o: one each for the layer
    y  = (x8 w^T + q) * s_x s_w                       q = round(b / (s_x s_w) - o * sum_k w): int32

so that each layer is five tensors: `weight` int8 (n, k), `input_scale` float16 (1,), `input_offset` int8 (1,),
`quant_bias` int32 (n,) and `deq_scale` int64 (n,), whose low half holds the bits of the float32 s_x s_w.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimkit.core.ascend.folder import Array
from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.maths.grid import steps_of

# The tensors of a layer.
PARTS = {
    "weight": np.dtype(np.int8), "input_scale": np.dtype(np.float16), "input_offset": np.dtype(np.int8),
    "quant_bias": np.dtype(np.int32), "deq_scale": np.dtype(np.int64),
}  # fmt: skip

# How far a weight may be from its whole number, in steps: float16 rounds it and the largest of its row by 2^-11 each,
# float32 by next to nothing. bfloat16 cannot say every whole number up to 127.
_OFF_HALF, _OFF = 0.13, 1e-3
# The smallest step of the inputs: float16 holds its reciprocal too.
_LEAST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Int8Layer:
    """The five tensors of one layer, and what the device computes with them.

    Args:
        weight: (n, k) int8.
        input_scale: (1,) float16.
        input_offset: (1,) int8.
        quant_bias: (n,) int32.
        deq_scale: (n,) int64, the bits of float32.

    Example:
        >>> layer = int8_layer("fc", np.array([[1.27, 0.0], [0.0, 2.54]], np.float32), None, -1.0, 1.0)
        >>> np.round(layer(np.array([[1.0, -0.5]], np.float32)), 2)
        array([[ 1.27, -1.28]], dtype=float32)
    """

    weight: Array
    input_scale: Array
    input_offset: Array
    quant_bias: Array
    deq_scale: Array

    @property
    def scale(self) -> Array:
        """(n,) float32: what a whole number of the product is worth."""
        return self.deq_scale.astype(np.uint32).view(np.float32)

    def inputs(self, x: Array) -> Array:
        """Inputs (..., k) as int8, as the device rounds them: to the nearest, ties to even."""
        steps = x.astype(np.float32) * (np.float32(1) / self.input_scale.astype(np.float32))
        return np.clip(np.round(steps + self.input_offset.astype(np.float32)), -128, 127).astype(np.int8)

    def __call__(self, x: Array) -> Array:
        """Outputs (..., n) float32 of inputs (..., k)."""
        product = self.inputs(x).astype(np.int32) @ self.weight.T.astype(np.int32)  # (..., n)
        return ((product + self.quant_bias).astype(np.float32) * self.scale).astype(np.float32)


def int8_layer(name: str, weight: Array, bias: Array | None, low: float, high: float) -> Int8Layer:
    """A layer as the device's five tensors.

    Args:
        name: for errors.
        weight: (n, k) floats on the grid of `SparseConfig(weight_bits=8)`.
        bias: (n,), or None.
        low, high: between which its inputs lie.

    Raises:
        ArgumentError: the weight is on no int8 grid, or a bias does not fit int32.
    """
    wide = np.asarray(weight, np.float64)
    step = steps_of(wide, 8)  # (n, 1)
    if not on_grid(wide):
        raise ArgumentError(
            f"the weight of {name!r} must be whole multiples of its rows' largest by 127. Received: other values. "
            "Compress the model with SparseConfig(weight_bits=8), which rounds while it solves."
        )
    whole = np.round(wide / step)  # (n, k)
    low, high = min(low, 0.0), max(high, 0.0)  # zero must be a whole number: padding and ReLU give it
    scale = max((high - low) / 255, _LEAST_SCALE)
    with np.errstate(over="ignore"):
        half = np.float16(scale)
        if float(half) < scale:  # rounded down, it would cut the range
            half = np.nextafter(half, np.float16(np.inf))
    if not np.isfinite(half):
        raise ArgumentError(f"the inputs of {name!r} must lie within what float16 holds. Received: {low:g} to {high:g}")
    offset = int(np.clip(np.round(-128 - low / float(half)), -128, 127))
    deq = (float(half) * step[:, 0]).astype(np.float32)  # (n,)
    shift = np.zeros(len(deq)) if bias is None else np.asarray(bias, np.float64) / deq
    held = np.round(shift - offset * whole.sum(axis=1))
    if np.abs(held).max(initial=0.0) > np.iinfo(np.int32).max:
        raise ArgumentError(f"the bias of {name!r} must fit int32 in units of its scales. Received: {held.max():g}")
    return Int8Layer(
        whole.astype(np.int8),
        np.array([half], np.float16),
        np.array([offset], np.int8),
        held.astype(np.int32),
        deq.view(np.uint32).astype(np.int64),
    )


def on_grid(weight: Array) -> bool:
    """Whether each row's values are whole multiples of its largest by 127, as far as its own precision can say.

    Args:
        weight: (n, k).

    Example:
        >>> on_grid(np.array([[1.27, -0.5]])), on_grid(np.array([[1.27, -0.5049]]))
        (True, False)
    """
    if weight.ndim != 2:
        return False
    wide = np.asarray(weight, np.float64)
    parts = wide / steps_of(wide, 8)
    halves = bool(np.all(wide.astype(np.float16) == wide))
    return bool(np.all(np.abs(parts - np.round(parts)) <= (_OFF_HALF if halves else _OFF)))
