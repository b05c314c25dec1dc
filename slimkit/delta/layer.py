"""What every layer that was swapped in keeps: the layer it stands for, and how the dense half of it is made."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.delta import initial

import torch
from torch import nn

__all__ = ["DeltaLayer", "DenseBase", "bridge"]


class DeltaLayer:
    """A mark on layers that hold a delta, with the layer that was there before."""

    delta_kind = ""

    def stand_for(self, original: nn.Module | None) -> None:
        """Remember the layer that was there before, outside the module tree so that no name changes."""
        self.__dict__["_original"] = (original,)

    @property
    def original(self) -> nn.Module | None:
        """The layer that was there before; None for a layer made by hand."""
        return self.__dict__.get("_original", (None,))[0]


class DenseBase(DeltaLayer, nn.Linear):
    """A linear layer by the documents' arguments, on which a delta is put.

    Args:
        in_channels, out_channels: width of the input and of the output.
        weight_init, bias_init: a tensor, a name, a number, or a function that fills a tensor.
        has_bias: whether there is a bias.
        activation: a name, a module or None; applied to the result.
        compute_dtype: float16, float32, or None for the input's own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
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
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_channels, out_channels
        self.weight = initial.parameter(weight_init, shape, torch.float32)
        self.bias = initial.parameter(bias_init, shape[:1], torch.float32) if has_bias else None
        self.activation = made
        self.compute_dtype = compute_dtype

    def _over(self, linear: nn.Linear) -> None:
        """Become the layer that takes a linear layer's place, sharing its very parameters."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = self.compute_dtype = None
        self.training = linear.training
        self.stand_for(linear)
