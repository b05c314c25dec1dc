"""What padding to the cube unit's blocks costs a layer, in bytes and in multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.core import check
from slimkit.core.ascend import targets
from slimkit.core.ascend.targets import BLOCK_ROWS, ITEM_BYTES, AscendTarget
from slimkit.core.errors import UnsupportedError


@dataclass(frozen=True)
class LayerWaste:
    """One weight on a target.

    Args:
        name: the layer.
        shape: (output channels, input channels, kernel sizes ...).
        dtype: what it is computed in.
        weight_bytes: its bytes in that dtype.
        padded_bytes: its bytes in whole blocks.
        macs: multiply-accumulates of one run; None where the number of rows is not known.
        padded_macs: those of whole blocks, rows padded too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weight_bytes: int
    padded_bytes: int
    macs: int | None
    padded_macs: int | None

    @property
    def wasted_bytes(self) -> float:
        """Share of the padded bytes that is padding, 0 to 1."""
        return 1 - self.weight_bytes / self.padded_bytes if self.padded_bytes else 0.0

    @property
    def wasted_macs(self) -> float | None:
        """Share of the padded multiply-accumulates that is padding, 0 to 1; None when not known."""
        if self.macs is None or not self.padded_macs:
            return None
        return 1 - self.macs / self.padded_macs

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "padded_bytes": self.padded_bytes,
            "wasted_bytes": self.wasted_bytes,
            "macs": self.macs,
            "padded_macs": self.padded_macs,
            "wasted_macs": self.wasted_macs,
        }


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`.

    Example:
        >>> round_up(17, 16)
        32
    """
    return -(-size // step) * step


def layer_waste(
    name: str, shape: Sequence[int], dtype: str, device: AscendTarget, rows: int | None
) -> LayerWaste | None:
    """The padding of one weight; None for a dtype whose blocks no document gives.

    Args:
        name: the layer.
        shape: (output channels, input channels, kernel sizes ...).
        dtype: what it is computed in.
        device: the target.
        rows: how many vectors meet the weight in one run (batch times positions), None when not known.
    """
    block = device.block(dtype)
    if block is None or len(shape) < 2:
        return None
    n_out, n_in, kernel = int(shape[0]), int(shape[1]), math.prod(int(s) for s in shape[2:])
    entries = n_out * n_in * kernel
    padded = round_up(n_out, block[0]) * round_up(n_in, block[1]) * kernel
    size = ITEM_BYTES[dtype]
    return LayerWaste(
        name=name,
        shape=tuple(int(s) for s in shape),
        dtype=dtype,
        weight_bytes=entries * size,
        padded_bytes=padded * size,
        macs=None if rows is None else rows * entries,
        # The rows of the other matrix fill blocks of 16 as well.
        padded_macs=None if rows is None else round_up(rows, BLOCK_ROWS) * padded,
    )


def totals(layers: Sequence[LayerWaste]) -> dict[str, Any]:
    """The sums over layers; multiply-accumulates over those layers where they are known."""
    counted = [layer for layer in layers if layer.macs is not None]
    weight_bytes, padded_bytes = sum(x.weight_bytes for x in layers), sum(x.padded_bytes for x in layers)
    macs, padded_macs = sum(x.macs or 0 for x in counted), sum(x.padded_macs or 0 for x in counted)
    return {
        "layers": len(layers),
        "weight_bytes": weight_bytes,
        "padded_bytes": padded_bytes,
        "wasted_bytes": 1 - weight_bytes / padded_bytes if padded_bytes else 0.0,
        "layers_with_macs": len(counted),
        "macs": macs if counted else None,
        "padded_macs": padded_macs if counted else None,
        "wasted_macs": 1 - macs / padded_macs if padded_macs else None,
    }


def padded_waste(
    shapes: Mapping[str, Sequence[int]],
    target: str | AscendTarget,
    *,
    dtype: str = "float16",
    rows: int | Mapping[str, int] | None = None,
) -> list[LayerWaste]:
    """What padding costs each layer on a target, from shapes alone: for planning widths before anything is cut.

    Args:
        shapes: layer -> (output channels, input channels, kernel sizes ...), as torch keeps Linear and Conv weights.
        target: "310P", "A2" or "A3".
        dtype: what is computed in: float16, bfloat16, float32, int8 or uint8.
        rows: vectors that meet each weight in one run (batch times positions), one number or one for each layer;
            None leaves the multiply-accumulates out.

    Returns:
        One entry a layer, in the order given.

    Raises:
        ArgumentTypeError: `shapes` is not a mapping of names to sequences of int.
        ArgumentError: an unknown target or dtype, or a shape with fewer than two axes or a size below 1.
        UnsupportedError: the target does not compute in that dtype.

    Example:
        >>> [w] = padded_waste({"fc": (10, 100)}, "310P", rows=1)
        >>> w.weight_bytes, w.padded_bytes, w.macs, w.padded_macs
        (2000, 3584, 1000, 28672)
    """
    device = targets.target(target)
    check.choice(dtype, ITEM_BYTES, "dtype")
    demand_dtype(device, dtype)
    check.instance(shapes, Mapping, "shapes", "a dict of layer name -> shape")
    found = []
    for name, shape in shapes.items():
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) < 2:
            check.wrong_value(f"shapes[{name!r}]", "(output channels, input channels, ...)", shape)
        for size in shape:
            check.positive(size, f"shapes[{name!r}]")
        count = rows.get(name) if isinstance(rows, Mapping) else rows
        if count is not None:
            check.positive(count, "rows")
        waste = layer_waste(str(name), shape, dtype, device, count)
        if waste is not None:
            found.append(waste)
    return found


def demand_dtype(device: AscendTarget, dtype: str) -> None:
    """Refuse a dtype that the target does not compute in."""
    if dtype in device.refused_dtypes:
        raise UnsupportedError(f"dtype {dtype!r}: {device.refused_dtypes[dtype]}. Use float16.")
