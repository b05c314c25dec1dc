"""What every layer that was swapped in keeps: the layer it stands for, and how the dense half of it is made."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import size
from slimkit.core.delta.named import OneAdapter
from slimkit.delta import initial
from slimkit.delta.shard import ShardPlan, plan

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["AdapterBase", "DeltaLayer", "DenseBase", "bridge"]


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
        size(in_channels, "in_channels")
        size(out_channels, "out_channels")
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

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """activation(x W' + bias), in the compute dtype and back."""
        if self.compute_dtype is None:
            out = F.linear(x, self.weight, self.bias)
        else:
            kind = self.compute_dtype
            bias = None if self.bias is None else self.bias.to(kind)
            out = F.linear(x.to(kind), self.weight.to(kind), bias).to(x.dtype)
        return out if self.activation is None else self.activation(out)


class AdapterBase(OneAdapter, DenseBase):
    """A linear layer that ends in an adapter; the kinds add the adapter."""

    @classmethod
    def build(cls, *args: Any, **options: Any) -> tuple[str, Any]:
        """The adapter for an output of that width, and the attribute that holds it."""
        raise AttributeError

    @classmethod
    def over(cls, linear: nn.Linear, name: str, dtype: Any, options: dict[str, Any]) -> Any:
        """The layer that takes a linear layer's place, with its very weight and bias and a new adapter."""
        layer = cls.__new__(cls)
        attribute, adapter = cls.build(linear.out_features, dtype or torch.float32, **options)
        layer._over(linear)
        setattr(layer, attribute, adapter.to(linear.weight.device))
        layer.begin(dict(options), name)
        return layer

    @property
    def adapter(self) -> nn.Module:
        """The adapter."""
        return getattr(self, f"mindpet_delta_{self.delta_kind}")

    def parts(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the adapter consists of."""
        return {f"mindpet_delta_{self.delta_kind}.{n}": p for n, p in self.adapter.named_parameters()}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.dense(input))

    def plan_with(self, own: dict[str, Any], inner: ShardPlan) -> ShardPlan:
        """The plan of the layer and the adapter's together."""
        mine = {"weight": ("matmul_org", 1), "bias": ("bias_org", 1)}
        sizes = {"k": self.in_features, "n": self.out_features}
        optional = {"bias_org": self.bias, "activation_org": self.activation}
        outer = plan(self, rules.DENSE, own, sizes, mine, optional)
        self.strategies = {**outer.strategies, **inner.strategies}
        prefix = f"mindpet_delta_{self.delta_kind}."
        cuts = {**outer.cuts, **{prefix + n: cut for n, cut in inner.cuts.items()}}
        return ShardPlan(self, self.strategies, cuts)
