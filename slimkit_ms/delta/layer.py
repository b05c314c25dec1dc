"""What every layer that was swapped in keeps: the layer it stands for, and how the dense half of it is made."""

from __future__ import annotations

from typing import Any

from slimkit.core import check
from slimkit_ms import bridge
from slimkit_ms.delta import initial

import mindspore as ms
from mindspore import nn, ops

__all__ = ["DeltaLayer", "DenseBase", "bridge", "take_over"]


class DeltaLayer:
    """A mark on cells that hold a delta, with the cell that was there before."""

    delta_kind = ""

    def stand_for(self, original: nn.Cell | None) -> None:
        """Remember the cell that was there before, outside the cell tree so that no name changes."""
        object.__setattr__(self, "_original", (original,))

    @property
    def original(self) -> nn.Cell | None:
        """The cell that was there before; None for a cell made by hand."""
        return self.__dict__.get("_original", (None,))[0]


def take_over(new: Any, old: nn.Cell) -> None:
    """Make a bare cell hold what another holds, the very parameters included; names of parameters stay."""
    nn.Cell.__init__(new)
    bare = set(new.__dict__)
    for name, value in old.__dict__.items():
        if name not in bare:
            object.__setattr__(new, name, value)
    new._params.update(old._params)
    new._cells.update(old._cells)
    new._primitives.update(old._primitives)
    new.training = old.training
    new.stand_for(old)


class DenseBase(DeltaLayer, nn.Dense):
    """A dense layer by the documents' arguments, on which a delta is put.

    Args:
        in_channels, out_channels: width of the input and of the output.
        weight_init, bias_init: a Tensor, a name, a number, or an Initializer.
        has_bias: whether there is a bias.
        activation: a name, a cell, a primitive or None; applied to the result.
        compute_dtype: float16 or float32; None for the input's own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
    ) -> None:
        check.positive(in_channels, "in_channels")
        check.positive(out_channels, "out_channels")
        check.boolean(has_bias, "has_bias")
        initial.dtype(param_init_type, "param_init_type")
        initial.dtype(compute_dtype, "compute_dtype", optional=True)
        shape = (out_channels, in_channels)
        initial.check_initial(weight_init, "weight_init", shape, "(out_channels, in_channels)")
        initial.check_initial(bias_init, "bias_init", shape[:1], "(out_channels,)")
        made = initial.activation(activation)
        nn.Dense.__init__(
            self,
            in_channels,
            out_channels,
            weight_init=initial.parameter(weight_init, shape, ms.float32, "weight").init_data(),
            bias_init=initial.parameter(bias_init, shape[:1], ms.float32, "bias").init_data() if has_bias else None,
            has_bias=has_bias,
            activation=made,
        )
        self.compute_dtype = compute_dtype
        self.cast = ops.Cast()

    def _over(self, dense: nn.Dense) -> None:
        """Become the layer that takes a dense layer's place, sharing its very parameters."""
        take_over(self, dense)
        self.compute_dtype = None
        self.cast = ops.Cast()
