"""Low-rank adapters: adapters whose two matrices are products of two thin ones."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import check_low_rank_adapter, check_reduction, size
from slimkit.delta import initial
from slimkit.delta.layer import Adapted, AdapterBase
from slimkit.delta.shard import ShardPlan, plan

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["LowRankAdapterDense", "LowRankAdapterLayer", "LowRankLinear", "bridge"]


class LowRankLinear(nn.Module):
    """A linear layer whose weight is left @ right, (in, rank) by (rank, out)."""

    def __init__(self, n_in: int, n_out: int, rank: int, left_init: Any, right_init: Any, dtype: Any) -> None:
        super().__init__()
        self.mindpet_delta_low_rank_adapter_weight_left = initial.parameter(left_init, (n_in, rank), dtype)
        self.mindpet_delta_low_rank_adapter_weight_right = initial.parameter(right_init, (rank, n_out), dtype)
        self.bias = nn.Parameter(torch.zeros(n_out, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        left = self.mindpet_delta_low_rank_adapter_weight_left.to(input.dtype)
        right = self.mindpet_delta_low_rank_adapter_weight_right.to(input.dtype)
        # x (left right) as (x left) right: rank-wide in between instead of a full matrix.
        return F.linear(input @ left, right.t(), self.bias.to(input.dtype))


class LowRankAdapterLayer(nn.Module):
    """An adapter of two low-rank matrices: x + non_linearity(x W_down) W_up; it starts as the identity.

    Args:
        hidden_size: width of the input and of the output.
        reduction_factor: the bottleneck is hidden_size // reduction_factor wide.
        low_rank_size: rank of each matrix.
        low_rank_w_init: a name or a function that fills a tensor; the last factor of W_up is zero whatever it says,
            so that training starts from the base.
        non_linearity: name of the activation in between.
        param_init_type: dtype of the parameters: torch.float16 or torch.float32.
        compute_dtype: dtype of the computation: torch.float16, torch.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, reduction_factor above hidden_size, an unknown initialiser or activation.

    Source:
        Mahabadi, Henderson & Ruder 2021, "Compacter", section 4, with one Kronecker term.

    Example:
        >>> LowRankAdapterLayer(8, reduction_factor=2)(torch.ones(1, 8)).sum().item()
        8.0
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int,
        low_rank_size: int = 1,
        low_rank_w_init: Any = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
    ) -> None:
        width = check_low_rank_adapter(hidden_size, reduction_factor, low_rank_size, non_linearity)
        if not isinstance(low_rank_w_init, str) and (
            isinstance(low_rank_w_init, type) or not callable(low_rank_w_init)
        ):
            check.wrong_type("low_rank_w_init", "a str or a function that fills a tensor", low_rank_w_init)
        initial.check_initial(low_rank_w_init, "low_rank_w_init", (), "")
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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input if self.compute_dtype is None else input.to(self.compute_dtype)
        act: Any = self.mindpet_delta_low_rank_adapter_non_linear
        low = act(self.mindpet_delta_low_rank_adapter_down_sampler(x))
        return input + self.mindpet_delta_low_rank_adapter_up_sampler(low).to(input.dtype)

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
    ) -> ShardPlan:
        """Record how the layer's operators are distributed and return the DTensor plan; see docs/delta.md.

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
            The plan; `plan.apply(mesh)` distributes the parameters.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        strategies = rules.given(rules.LOW_RANK_ADAPTER, locals())
        sizes = {"h": self.hidden_size, "m": self.bottleneck_size, "r": self.low_rank_size}
        act = {"non_linearity": self.mindpet_delta_low_rank_adapter_non_linear}
        return plan(self, rules.LOW_RANK_ADAPTER, strategies, sizes, rules.LOW_RANK_ADAPTER_PARAMETERS, act)


class LowRankAdaptedLinear(Adapted):
    """A linear layer that a low-rank adapter was put behind."""

    delta_kind = "low_rank_adapter"


def low_rank_adapter_for(
    width: int,
    dtype: Any,
    reduction_factor: int = 1,
    low_rank_size: int = 1,
    low_rank_w_init: Any = "xavier_uniform",
    non_linearity: str = "gelu",
) -> LowRankAdapterLayer:
    """The adapter for an output of that width, by the options of `apply_delta`."""
    return LowRankAdapterLayer(width, reduction_factor, low_rank_size, low_rank_w_init, non_linearity, dtype)


class LowRankAdapterDense(AdapterBase):
    """A linear layer that ends in a low-rank adapter: LowRankAdapterLayer(activation(x W' + bias)).

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight (out_channels, in_channels): a tensor, a name, a number or a function.
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a module or None; applied before the adapter.
        reduction_factor: the bottleneck is out_channels // reduction_factor wide.
        low_rank_size: rank of each matrix.
        low_rank_w_init: see LowRankAdapterLayer.
        non_linearity: name of the adapter's activation.
        param_init_type: dtype of the adapter's parameters: torch.float16 or torch.float32.
        compute_dtype: dtype of the computation: torch.float16, torch.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, reduction_factor above out_channels, an initial tensor of another shape, an
            unknown initialiser or non_linearity.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Mahabadi, Henderson & Ruder 2021, "Compacter", section 4, with one Kronecker term.

    Example:
        >>> LowRankAdapterDense(4, 2)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
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
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
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
    ) -> ShardPlan:
        """Record how the layer's operators are distributed and return the DTensor plan; see docs/delta.md.

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
            The plan; `plan.apply(mesh)` distributes the parameters.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        own = rules.given(rules.DENSE, locals())
        inner = self.mindpet_delta_low_rank_adapter.shard(**rules.passed_on(rules.LOW_RANK_ADAPTER, locals()))
        return self.plan_with(own, inner)
