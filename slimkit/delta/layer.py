"""Layers with an adapter behind them, and the dense half of the layers that are built by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import size
from slimkit.core.delta.named import MERGING_BOOK, OneAdapter, OneMerging
from slimkit.delta import initial
from slimkit.delta.attach import DeltaLayer
from slimkit.delta.named import MergingLayer
from slimkit.delta.shard import ShardPlan, plan

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Adapted", "AdaptedMerging", "AdapterBase", "DeltaLayer", "DenseBase", "bridge"]


class DenseBase(nn.Linear):
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

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """activation(x W' + bias), in the compute dtype and back."""
        if self.compute_dtype is None:
            out = F.linear(x, self.weight, self.bias)
        else:
            kind = self.compute_dtype
            bias = None if self.bias is None else self.bias.to(kind)
            out = F.linear(x.to(kind), self.weight.to(kind), bias).to(x.dtype)
        return out if self.activation is None else self.activation(out)


class Adapted(OneAdapter, DeltaLayer):
    """A layer whose output goes through an adapter."""

    word = "Adapted"
    in_features: int
    out_features: int

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> int:
        """How wide what is put on a layer is."""
        return int(layer.out_features)

    @property
    def adapter(self) -> nn.Module:
        """The adapter."""
        held: nn.Module = getattr(self, f"mindpet_delta_{self.delta_kind}")
        return held

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the adapter consists of."""
        return {f"mindpet_delta_{self.delta_kind}.{n}": p for n, p in self.adapter.named_parameters()}

    def leave(self) -> None:
        """Take the adapter off, in place."""
        delattr(self, f"mindpet_delta_{self.delta_kind}")
        for attribute in ("delta_specs", "active_deltas", "delta_acts"):
            del vars(self)[attribute]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, Adapted):  # somebody kept this method, and the adapter is off
            return type(self).forward(self, input)
        out = super().forward(input)  # type: ignore[misc]
        return self.adapter(out) if self.delta_acts else out

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """The plain layer's output through the adapter."""
        adapter = self.adapter
        place = next(adapter.parameters()).device
        return adapter(out.to(place)).to(out.device)


class AdaptedMerging(OneMerging, Adapted, MergingLayer):
    """A layer with one delta that can be merged into its weight."""

    def leave(self) -> None:
        """Take the delta off, in place."""
        super().leave()
        for attribute in MERGING_BOOK:
            vars(self).pop(attribute, None)


class AdapterBase(Adapted, DenseBase):
    """A linear layer built by hand that ends in an adapter; the kinds add the adapter."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = self.dense(input)
        return self.adapter(out) if self.delta_acts else out

    def plan_with(self, own: dict[str, Any], inner: ShardPlan) -> ShardPlan:
        """The plan of the layer and the adapter's together."""
        sizes = {"k": self.in_features, "n": self.out_features}
        optional = {"bias_org": self.bias, "activation_org": self.activation}
        outer = plan(self, rules.DENSE, own, sizes, rules.DENSE_PARAMETERS, optional)
        self.strategies = {**outer.strategies, **inner.strategies}
        prefix = f"mindpet_delta_{self.delta_kind}."
        cuts = {**outer.cuts, **{prefix + n: cut for n, cut in inner.cuts.items()}}
        return ShardPlan(self, self.strategies, cuts)
