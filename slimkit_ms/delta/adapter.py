"""Bottleneck adapters: the layer on its own, and the linear layer that ends in one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import check_adapter, size
from slimkit_ms import bridge
from slimkit_ms.delta import initial
from slimkit_ms.delta.layer import Adapted, AdapterBase
from slimkit_ms.delta.shard import record

import mindspore
from mindspore import nn, ops

__all__ = ["AdapterDense", "AdapterLayer", "bridge"]


class AdapterLayer(nn.Cell):
    """A bottleneck beside the identity: x + up(non_linearity(down(x))); it starts as the identity.

    Args:
        hidden_size: width of the input and of the output.
        bottleneck_size: width in between.
        non_linearity: name of the activation in between.
        param_init_type: dtype of the parameters: mindspore.float16 or mindspore.float32.
        compute_dtype: dtype of the computation: mindspore.float16, mindspore.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, an unknown activation.

    Source:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

    Example:
        >>> AdapterLayer(8, bottleneck_size=2)(mindspore.ops.ones((1, 8))).shape
        (1, 8)
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = mindspore.float32,
        compute_dtype: Any = mindspore.float16,
    ) -> None:
        check_adapter(hidden_size, bottleneck_size, non_linearity)
        initial.dtype(param_init_type, "param_init_type")
        initial.dtype(compute_dtype, "compute_dtype", optional=True)
        super().__init__()
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.compute_dtype = compute_dtype
        down = nn.Dense(hidden_size, bottleneck_size, bias_init="zeros", dtype=param_init_type)
        up = nn.Dense(bottleneck_size, hidden_size, weight_init="zeros", bias_init="zeros", dtype=param_init_type)
        self.mindpet_delta_adapter_block = nn.SequentialCell(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=down,
                mindpet_delta_adapter_non_linear=initial.activation(non_linearity),
                mindpet_delta_adapter_up_sampler=up,
            )
        )
        self.residual_add = ops.Add()
        self.cast = ops.Cast()

    def construct(self, x: Any) -> Any:
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        down, act, up = self.mindpet_delta_adapter_block.cell_list
        flat = self.cast(x.reshape((-1, x.shape[-1])), kind)
        low = down.bias_add(down.matmul(flat, self.cast(down.weight, kind)), self.cast(down.bias, kind))
        side = up.bias_add(up.matmul(act(low), self.cast(up.weight, kind)), self.cast(up.bias, kind))
        return self.residual_add(x, self.cast(side.reshape(x.shape), x.dtype))

    def shard(
        self,
        strategy_matmul_down_sampler: Any = None,
        strategy_bias_down_sampler: Any = None,
        strategy_non_linearity: Any = None,
        strategy_matmul_up_sampler: Any = None,
        strategy_bias_up_sampler: Any = None,
        strategy_residual_add: Any = None,
    ) -> Any:
        """Record how the layer's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            strategy_matmul_down_sampler: ((batch, hidden), (bottleneck, hidden)).
            strategy_bias_down_sampler: ((batch, bottleneck), (bottleneck,)).
            strategy_non_linearity: ((batch, bottleneck),).
            strategy_matmul_up_sampler: ((batch, bottleneck), (hidden, bottleneck)).
            strategy_bias_up_sampler: ((batch, hidden), (hidden,)).
            strategy_residual_add: ((batch, hidden), (batch, hidden)).

        Returns:
            The layer; `layer.strategies` holds what was recorded.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        strategies = rules.given(rules.ADAPTER, locals())
        sizes = {"h": self.hidden_size, "m": self.bottleneck_size}
        down, act, up = self.mindpet_delta_adapter_block.cell_list
        operators = {
            "matmul_down_sampler": down.matmul,
            "bias_down_sampler": down.bias_add,
            "non_linearity": act,
            "matmul_up_sampler": up.matmul,
            "bias_up_sampler": up.bias_add,
            "residual_add": self.residual_add,
        }
        record(self, rules.ADAPTER, strategies, sizes, operators)
        return self


class AdaptedLinear(Adapted):
    """A dense layer that an adapter was put behind."""

    delta_kind = "adapter"

    def construct(self, x: Any) -> Any:
        out = self.plain_construct(x)
        if self.delta_acts:
            out = self.mindpet_delta_adapter(out)
        return out


def adapter_for(width: int, dtype: Any, bottleneck_size: int = 64, non_linearity: str = "gelu") -> AdapterLayer:
    """The adapter for an output of that width, by the options of `apply_delta`."""
    return AdapterLayer(width, bottleneck_size, non_linearity, dtype, None)


class AdapterDense(AdapterBase):
    """A linear layer that ends in an adapter: AdapterLayer(activation(x W' + bias)).

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight (out_channels, in_channels): a Tensor, a name, a number or an Initializer.
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a cell, a primitive or None; applied before the adapter.
        bottleneck_size: width of the adapter's middle.
        non_linearity: name of the adapter's activation.
        param_init_type: dtype of the adapter's parameters: mindspore.float16 or mindspore.float32.
        compute_dtype: dtype of the computation: mindspore.float16, mindspore.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, an initial Tensor of another shape, an unknown initialiser or non_linearity.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

    Example:
        >>> AdapterDense(4, 2, bottleneck_size=1)(mindspore.ops.ones((3, 4))).shape
        (3, 2)
    """

    delta_kind = "adapter"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = mindspore.float32,
        compute_dtype: Any = mindspore.float16,
    ) -> None:
        size(out_channels, "out_channels")
        adapter = AdapterLayer(out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype)
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self.mindpet_delta_adapter = adapter
        self.carry_delta({"bottleneck_size": bottleneck_size, "non_linearity": non_linearity})

    def construct(self, x: Any) -> Any:
        out = self.dense(x)
        if self.delta_acts:
            out = self.mindpet_delta_adapter(out)
        return out

    def shard(
        self,
        strategy_matmul_org: Any = None,
        strategy_bias_org: Any = None,
        strategy_activation_org: Any = None,
        strategy_matmul_down_sampler: Any = None,
        strategy_bias_down_sampler: Any = None,
        strategy_non_linearity: Any = None,
        strategy_matmul_up_sampler: Any = None,
        strategy_bias_up_sampler: Any = None,
        strategy_residual_add: Any = None,
    ) -> Any:
        """Record how the layer's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            strategy_matmul_org: ((batch, in), (out, in)) cuts of the matmul's two inputs.
            strategy_bias_org: ((batch, out), (out,)).
            strategy_activation_org: ((batch, out),).
            strategy_matmul_down_sampler: and the further ones: see AdapterLayer.shard.
            strategy_bias_down_sampler: see AdapterLayer.shard.
            strategy_non_linearity: see AdapterLayer.shard.
            strategy_matmul_up_sampler: see AdapterLayer.shard.
            strategy_bias_up_sampler: see AdapterLayer.shard.
            strategy_residual_add: see AdapterLayer.shard.

        Returns:
            The layer; `layer.strategies` holds what was recorded.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        own = rules.given(rules.DENSE, locals())
        self.check_own(own)
        self.mindpet_delta_adapter.shard(**rules.passed_on(rules.ADAPTER, locals()))
        return self.record_own(own)
