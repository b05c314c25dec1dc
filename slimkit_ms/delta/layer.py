"""Layers with an adapter behind them, and the dense half of the layers that are built by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core import check
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import size
from slimkit.core.delta.named import MERGING_BOOK, OneAdapter, OneMerging
from slimkit_ms import bridge, kinds
from slimkit_ms.delta import initial
from slimkit_ms.delta.attach import DeltaLayer, forget
from slimkit_ms.delta.named import MergingLayer
from slimkit_ms.delta.shard import check_only, record

import mindspore as ms
from mindspore import nn, ops

__all__ = ["Adapted", "AdaptedMerging", "AdapterBase", "DeltaLayer", "DenseBase", "bridge"]


class DenseBase(nn.Dense):
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
        size(in_channels, "in_channels")
        size(out_channels, "out_channels")
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

    def dense(self, x: Any) -> Any:
        """activation(x W' + bias), in the compute dtype and back."""
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        flat = self.cast(self.reshape(x, (-1, x.shape[-1])), kind)
        out = self.matmul(flat, self.cast(self.weight, kind))
        if self.has_bias:
            out = self.bias_add(out, self.cast(self.bias, kind))
        if self.activation_flag:
            out = self.activation(out)
        return self.cast(self.reshape(out, x.shape[:-1] + (self.out_channels,)), x.dtype)


class Adapted(OneAdapter, DeltaLayer):
    """A layer whose output goes through an adapter."""

    word = "Adapted"
    _cells: dict[str, Any]

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> int:
        """How wide what is put on a layer is."""
        return int(kinds.width_of(layer))

    @property
    def adapter(self) -> nn.Cell:
        """The adapter."""
        return self._cells[f"mindpet_delta_{self.delta_kind}"]

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Path below the layer -> tensor of everything the adapter consists of."""
        return {f"mindpet_delta_{self.delta_kind}.{n}": p for n, p in self.adapter.parameters_and_names()}

    def leave(self) -> None:
        """Take the adapter off, in place."""
        forget(self, f"mindpet_delta_{self.delta_kind}", "delta_specs", "active_deltas", "delta_acts")


class AdaptedMerging(OneMerging, Adapted, MergingLayer):
    """A layer with one delta that can be merged into its weight."""

    def leave(self) -> None:
        """Take the delta off, in place."""
        super().leave()
        forget(self, *MERGING_BOOK)


class AdapterBase(Adapted, DenseBase):
    """A dense layer built by hand that ends in an adapter; the kinds add the adapter."""

    strategies: dict[str, Any]

    def _own(self) -> tuple[dict[str, int], dict[str, Any]]:
        operators = {
            "matmul_org": self.matmul,
            "bias_org": self.bias_add if self.has_bias else None,
            "activation_org": self.activation,
        }
        return {"k": self.in_channels, "n": self.out_channels}, operators

    def check_own(self, strategies: dict[str, Any]) -> None:
        """Check the dense half's strategies before the adapter's are recorded."""
        check_only(self, rules.DENSE, strategies, *self._own())

    def record_own(self, strategies: dict[str, Any]) -> Any:
        """Record the dense half's strategies beside the adapter's, in place."""
        record(self, rules.DENSE, strategies, *self._own())
        mine: dict[str, Any] = self.strategies
        self.strategies = {**mine, **self.adapter.strategies}
        return self
