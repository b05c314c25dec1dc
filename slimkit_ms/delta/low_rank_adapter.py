"""Low-rank adapters: adapters whose two matrices are products of two thin ones."""

from __future__ import annotations

from typing import Any

from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import check_low_rank_adapter, check_reduction, size
from slimkit_ms import bridge
from slimkit_ms.delta import initial
from slimkit_ms.delta.layer import Adapted, AdapterBase
from slimkit_ms.delta.shard import record

import mindspore
from mindspore import nn, ops

__all__ = ["LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear", "bridge"]


class LowRankLinear(nn.Cell):
    """A dense layer whose weight is left @ right, (in, rank) by (rank, out)."""

    def __init__(self, n_in: int, n_out: int, rank: int, left_init: Any, right_init: Any, dtype: Any) -> None:
        super().__init__()
        left, right = "mindpet_delta_low_rank_adapter_weight_left", "mindpet_delta_low_rank_adapter_weight_right"
        self.mindpet_delta_low_rank_adapter_weight_left = initial.parameter(left_init, (n_in, rank), dtype, left)
        self.mindpet_delta_low_rank_adapter_weight_right = initial.parameter(right_init, (rank, n_out), dtype, right)
        self.bias = initial.parameter("zeros", (n_out,), dtype, "bias")
        self.matmul_weight = ops.MatMul()
        self.matmul_input = ops.MatMul()
        self.bias_add = ops.BiasAdd()
        self.cast = ops.Cast()

    def construct(self, x: Any) -> Any:
        left = self.cast(self.mindpet_delta_low_rank_adapter_weight_left, x.dtype)
        right = self.cast(self.mindpet_delta_low_rank_adapter_weight_right, x.dtype)
        # The documents name two matmuls, one of the weights and one of the input: each can be cut on its own.
        return self.bias_add(self.matmul_input(x, self.matmul_weight(left, right)), self.cast(self.bias, x.dtype))


class LowRankAdapterLayer(nn.Cell):
    """An adapter of two low-rank matrices: x + non_linearity(x W_down) W_up; it starts as the identity.

    Args:
        hidden_size: width of the input and of the output.
        reduction_factor: the bottleneck is hidden_size // reduction_factor wide.
        low_rank_size: rank of each matrix.
        low_rank_w_init: a name or an Initializer; the last factor of W_up is zero whatever it says,
            so that training starts from the base.
        non_linearity: name of the activation in between.
        param_init_type: dtype of the parameters: mindspore.float16 or mindspore.float32.
        compute_dtype: dtype of the computation: mindspore.float16, mindspore.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, reduction_factor above hidden_size, an unknown initialiser or activation.

    Source:
        Mahabadi, Henderson & Ruder 2021, "Compacter", section 4, with one Kronecker term.

    Example:
        >>> LowRankAdapterLayer(8, reduction_factor=2)(mindspore.ops.ones((1, 8))).shape
        (1, 8)
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = mindspore.float32,
        compute_dtype: Any = mindspore.float16,
    ) -> None:
        width = check_low_rank_adapter(hidden_size, reduction_factor, low_rank_size, non_linearity)
        initial.check_initial(low_rank_w_init, "low_rank_w_init", (), "", tensor=False)
        initial.dtype(param_init_type, "param_init_type")
        initial.dtype(compute_dtype, "compute_dtype", optional=True)
        super().__init__()
        self.hidden_size, self.bottleneck_size, self.low_rank_size = hidden_size, width, low_rank_size
        self.compute_dtype = compute_dtype
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankLinear(
            hidden_size, width, low_rank_size, low_rank_w_init, low_rank_w_init, param_init_type
        )
        self.mindpet_delta_low_rank_adapter_non_linear = initial.activation(non_linearity)
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankLinear(
            width, hidden_size, low_rank_size, low_rank_w_init, "zeros", param_init_type
        )

        self.residual_add = ops.Add()
        self.cast = ops.Cast()

    def construct(self, x: Any) -> Any:
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        flat = self.cast(x.reshape((-1, x.shape[-1])), kind)
        low = self.mindpet_delta_low_rank_adapter_down_sampler(flat)
        side = self.mindpet_delta_low_rank_adapter_up_sampler(self.mindpet_delta_low_rank_adapter_non_linear(low))
        return self.residual_add(x, self.cast(side.reshape(x.shape), x.dtype))

    def shard(
        self,
        strategy_matmul_down_sampler_weight: Any = None,
        strategy_matmul_down_sampler_input: Any = None,
        strategy_bias_down_sampler: Any = None,
        strategy_non_linearity: Any = None,
        strategy_matmul_up_sampler_weight: Any = None,
        strategy_matmul_up_sampler_input: Any = None,
        strategy_bias_up_sampler: Any = None,
        strategy_residual_add: Any = None,
    ) -> Any:
        """Record how the layer's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            strategy_matmul_down_sampler_weight: ((hidden, rank), (rank, bottleneck)).
            strategy_matmul_down_sampler_input: ((batch, hidden), (hidden, bottleneck)).
            strategy_bias_down_sampler: ((batch, bottleneck), (bottleneck,)).
            strategy_non_linearity: ((batch, bottleneck),).
            strategy_matmul_up_sampler_weight: ((bottleneck, rank), (rank, hidden)).
            strategy_matmul_up_sampler_input: ((batch, bottleneck), (bottleneck, hidden)).
            strategy_bias_up_sampler: ((batch, hidden), (hidden,)).
            strategy_residual_add: ((batch, hidden), (batch, hidden)).

        Returns:
            The layer; `layer.strategies` holds what was recorded.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        strategies = rules.given(rules.LOW_RANK_ADAPTER, locals())
        sizes = {"h": self.hidden_size, "m": self.bottleneck_size, "r": self.low_rank_size}
        down, up = self.mindpet_delta_low_rank_adapter_down_sampler, self.mindpet_delta_low_rank_adapter_up_sampler
        operators = {
            "matmul_down_sampler_weight": down.matmul_weight,
            "matmul_down_sampler_input": down.matmul_input,
            "bias_down_sampler": down.bias_add,
            "non_linearity": self.mindpet_delta_low_rank_adapter_non_linear,
            "matmul_up_sampler_weight": up.matmul_weight,
            "matmul_up_sampler_input": up.matmul_input,
            "bias_up_sampler": up.bias_add,
            "residual_add": self.residual_add,
        }
        record(self, rules.LOW_RANK_ADAPTER, strategies, sizes, operators)
        return self


class LowRankAdaptedLinear(Adapted):
    """A dense layer that a low-rank adapter was put behind."""

    delta_kind = "low_rank_adapter"

    def construct(self, x: Any) -> Any:
        out = self.plain_construct(x)
        if self.delta_acts:
            out = self.mindpet_delta_low_rank_adapter(out)
        return out


def low_rank_adapter_for(
    width: int,
    dtype: Any,
    reduction_factor: int = 1,
    low_rank_size: int = 1,
    low_rank_w_init: Any = "xavier_uniform",
    non_linearity: str = "gelu",
) -> LowRankAdapterLayer:
    """The adapter for an output of that width, by the options of `apply_delta`."""
    return LowRankAdapterLayer(width, reduction_factor, low_rank_size, low_rank_w_init, non_linearity, dtype, None)


class LowRankAdapterDense(AdapterBase):
    """A linear layer that ends in a low-rank adapter: LowRankAdapterLayer(activation(x W' + bias)).

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight (out_channels, in_channels): a Tensor, a name, a number or an Initializer.
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a cell, a primitive or None; applied before the adapter.
        reduction_factor: the bottleneck is out_channels // reduction_factor wide.
        low_rank_size: rank of each matrix.
        low_rank_w_init: see LowRankAdapterLayer.
        non_linearity: name of the adapter's activation.
        param_init_type: dtype of the adapter's parameters: mindspore.float16 or mindspore.float32.
        compute_dtype: dtype of the computation: mindspore.float16, mindspore.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, reduction_factor above out_channels, an initial Tensor of another shape, an
            unknown initialiser or non_linearity.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Mahabadi, Henderson & Ruder 2021, "Compacter", section 4, with one Kronecker term.

    Example:
        >>> LowRankAdapterDense(4, 2)(mindspore.ops.ones((3, 4))).shape
        (3, 2)
    """

    delta_kind = "low_rank_adapter"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = mindspore.float32,
        compute_dtype: Any = mindspore.float16,
    ) -> None:
        size(out_channels, "out_channels")
        check_reduction(out_channels, reduction_factor, "out_channels")
        adapter = LowRankAdapterLayer(
            out_channels,
            reduction_factor,
            low_rank_size,
            low_rank_w_init,
            non_linearity,
            param_init_type,
            compute_dtype,
        )
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self.mindpet_delta_low_rank_adapter = adapter
        options = {"reduction_factor": reduction_factor, "low_rank_size": low_rank_size, "non_linearity": non_linearity}
        self.carry_delta(options)

    def construct(self, x: Any) -> Any:
        out = self.dense(x)
        if self.delta_acts:
            out = self.mindpet_delta_low_rank_adapter(out)
        return out

    def shard(
        self,
        strategy_matmul_org: Any = None,
        strategy_bias_org: Any = None,
        strategy_activation_org: Any = None,
        strategy_matmul_down_sampler_weight: Any = None,
        strategy_matmul_down_sampler_input: Any = None,
        strategy_bias_down_sampler: Any = None,
        strategy_non_linearity: Any = None,
        strategy_matmul_up_sampler_weight: Any = None,
        strategy_matmul_up_sampler_input: Any = None,
        strategy_bias_up_sampler: Any = None,
        strategy_residual_add: Any = None,
    ) -> Any:
        """Record how the layer's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            strategy_matmul_org: ((batch, in), (out, in)) cuts of the matmul's two inputs.
            strategy_bias_org: ((batch, out), (out,)).
            strategy_activation_org: ((batch, out),).
            strategy_matmul_down_sampler_weight: and the further ones: see LowRankAdapterLayer.shard.
            strategy_matmul_down_sampler_input: see LowRankAdapterLayer.shard.
            strategy_bias_down_sampler: see LowRankAdapterLayer.shard.
            strategy_non_linearity: see LowRankAdapterLayer.shard.
            strategy_matmul_up_sampler_weight: see LowRankAdapterLayer.shard.
            strategy_matmul_up_sampler_input: see LowRankAdapterLayer.shard.
            strategy_bias_up_sampler: see LowRankAdapterLayer.shard.
            strategy_residual_add: see LowRankAdapterLayer.shard.

        Returns:
            The layer; `layer.strategies` holds what was recorded.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        own = rules.given(rules.DENSE, locals())
        self.check_own(own)
        self.mindpet_delta_low_rank_adapter.shard(**rules.passed_on(rules.LOW_RANK_ADAPTER, locals()))
        return self.record_own(own)
