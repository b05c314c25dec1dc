"""What every layer that was swapped in keeps: the layer it stands for, and how the dense half of it is made."""

from __future__ import annotations

from typing import Any

from slimkit.core import check
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import size
from slimkit.core.delta.named import OneAdapter
from slimkit_ms import bridge, kinds
from slimkit_ms.delta import initial
from slimkit_ms.delta.shard import check_only, record

import mindspore as ms
from mindspore import nn, ops

__all__ = ["AdapterBase", "DeltaLayer", "DenseBase", "bridge", "take_over"]


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

    def _over(self, dense: nn.Cell) -> None:
        """Become the layer that takes a dense layer's place, sharing its very parameters."""
        take_over(self, dense)
        if not isinstance(dense, nn.Dense):
            # mint's Linear has other words for its widths, and one operator for product and bias.
            del self._primitives["dense"], self.__dict__["dense"]
            self.out_channels, self.in_channels = (int(n) for n in dense.weight.shape)
            self.reshape, self.matmul, self.bias_add = ops.Reshape(), ops.MatMul(transpose_b=True), ops.BiasAdd()
            self.activation: Any = None
            self.activation_flag = False
        self.compute_dtype = None
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


class AdapterBase(OneAdapter, DenseBase):
    """A dense layer that ends in an adapter; the kinds add the adapter."""

    strategies: dict[str, Any]

    @classmethod
    def build(cls, *args: Any, **options: Any) -> tuple[str, Any]:
        """The adapter for an output of that width, and the attribute that holds it."""
        raise AttributeError

    @classmethod
    def over(cls, dense: nn.Cell, name: str, dtype: Any, options: dict[str, Any]) -> Any:
        """The layer that takes a dense layer's place, with its very weight and bias and a new adapter."""
        layer = cls.__new__(cls)
        attribute, adapter = cls.build(kinds.width_of(dense), dtype or ms.float32, **options)
        layer._over(dense)
        layer.insert_child_to_cell(attribute, adapter)
        layer.begin(dict(options), name)
        return layer

    @property
    def adapter(self) -> nn.Cell:
        """The adapter."""
        return self._cells[f"mindpet_delta_{self.delta_kind}"]

    def parts(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Path below the layer -> tensor of everything the adapter consists of."""
        return {f"mindpet_delta_{self.delta_kind}.{n}": p for n, p in self.adapter.parameters_and_names()}

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
