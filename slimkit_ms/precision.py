"""Half precision for the layers that gain from it, parameters left in float32, and back again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn
from mindspore._c_expression import Cell_, MixedPrecisionType

_LAYERS = (nn.Dense, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Conv1dTranspose, nn.Conv2dTranspose, nn.Conv3dTranspose)


def lower(model: nn.Cell, kind: Any) -> Callable[[], None]:
    """Let dense and convolution layers compute in half precision, in place.

    Args:
        model: the cell.
        kind: ms.float16 or ms.bfloat16.

    Returns:
        A function that undoes it; layers with a precision of their own are left alone by both.
    """
    cells = [c for _, c in model.cells_and_names() if isinstance(c, _LAYERS) and c.mixed_precision_type is None]
    for cell in cells:
        cell.to_float(kind)
    bridge.forget_graphs(model)

    def undo() -> None:
        for cell in cells:
            cell.add_flags(fp16=False, fp32=False, bf16=False)
            # MindSpore offers no way back: to_float(float32) would cast the inputs of float64 layers too.
            cell.mixed_precision_type = None
            Cell_.set_mixed_precision_type(cell, MixedPrecisionType.NOTSET)
        bridge.forget_graphs(model)

    return undo


def lift(value: Any) -> Any:
    """A half-precision tensor (also in a tuple) as float32, for the loss; read by the graph compiler."""
    if isinstance(value, tuple):
        lifted: tuple = ()
        for part in value:
            lifted = lifted + (lift(part),)
        return lifted
    if isinstance(value, ms.Tensor) and (value.dtype == ms.float16 or value.dtype == ms.bfloat16):
        return value.astype(ms.float32)
    return value
