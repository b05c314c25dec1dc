"""Bottleneck adapters: the layer on its own, and the linear layer that ends in one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from slimkit import bridge
from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import check_adapter, size
from slimkit.delta import initial
from slimkit.delta.layer import Adapted, AdapterBase
from slimkit.delta.shard import ShardPlan, plan

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["AdapterDense", "AdapterLayer", "bridge"]


class AdapterLayer(nn.Module):
    """A bottleneck beside the identity: x + up(non_linearity(down(x))); it starts as the identity.

    Args:
        hidden_size: width of the input and of the output.
        bottleneck_size: width in between.
        non_linearity: name of the activation in between.
        param_init_type: dtype of the parameters: torch.float16 or torch.float32.
        compute_dtype: dtype of the computation: torch.float16, torch.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, an unknown activation.

    Source:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

    Example:
        >>> AdapterLayer(8, bottleneck_size=2)(torch.ones(1, 8)).sum().item()
        8.0
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
    ) -> None:
        check_adapter(hidden_size, bottleneck_size, non_linearity)
        initial.dtype(param_init_type, "param_init_type")
        initial.dtype(compute_dtype, "compute_dtype", optional=True)
        super().__init__()
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.compute_dtype = compute_dtype
        down = nn.Linear(hidden_size, bottleneck_size, dtype=param_init_type)
        up = nn.Linear(bottleneck_size, hidden_size, dtype=param_init_type)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.mindpet_delta_adapter_block = nn.Sequential(
            OrderedDict(
                mindpet_delta_adapter_down_sampler=down,
                mindpet_delta_adapter_non_linear=initial.activation(non_linearity),
                mindpet_delta_adapter_up_sampler=up,
            )
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        down, act, up = self.mindpet_delta_adapter_block
        kind = input.dtype if self.compute_dtype is None else self.compute_dtype
        x = input.to(kind)
        low = act(F.linear(x, down.weight.to(kind), down.bias.to(kind)))
        return input + F.linear(low, up.weight.to(kind), up.bias.to(kind)).to(input.dtype)

    def shard(
        self,
        strategy_matmul_down_sampler: Any = None,
        strategy_bias_down_sampler: Any = None,
        strategy_non_linearity: Any = None,
        strategy_matmul_up_sampler: Any = None,
        strategy_bias_up_sampler: Any = None,
        strategy_residual_add: Any = None,
    ) -> ShardPlan:
        """Record how the layer's operators are distributed and return the DTensor plan; see docs/delta.md.

        Args:
            strategy_matmul_down_sampler: ((batch, hidden), (bottleneck, hidden)).
            strategy_bias_down_sampler: ((batch, bottleneck), (bottleneck,)).
            strategy_non_linearity: ((batch, bottleneck),).
            strategy_matmul_up_sampler: ((batch, bottleneck), (hidden, bottleneck)).
            strategy_bias_up_sampler: ((batch, hidden), (hidden,)).
            strategy_residual_add: ((batch, hidden), (batch, hidden)).

        Returns:
            The plan; `plan.apply(mesh)` distributes the parameters.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        strategies = rules.given(rules.ADAPTER, locals())
        sizes = {"h": self.hidden_size, "m": self.bottleneck_size}
        act = self.mindpet_delta_adapter_block[1]
        return plan(self, rules.ADAPTER, strategies, sizes, rules.ADAPTER_PARAMETERS, {"non_linearity": act})


class AdaptedLinear(Adapted):
    """A linear layer that an adapter was put behind."""

    delta_kind = "adapter"


def adapter_for(width: int, dtype: Any, bottleneck_size: int = 64, non_linearity: str = "gelu") -> AdapterLayer:
    """The adapter for an output of that width, by the options of `apply_delta`."""
    return AdapterLayer(width, bottleneck_size, non_linearity, dtype)


class AdapterDense(AdapterBase):
    """A linear layer that ends in an adapter: AdapterLayer(activation(x W' + bias)).

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        weight_init: start of the weight (out_channels, in_channels): a tensor, a name, a number or a function.
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a module or None; applied before the adapter.
        bottleneck_size: width of the adapter's middle.
        non_linearity: name of the adapter's activation.
        param_init_type: dtype of the adapter's parameters: torch.float16 or torch.float32.
        compute_dtype: dtype of the computation: torch.float16, torch.float32, or None for the input's own.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, an initial tensor of another shape, an unknown initialiser or non_linearity.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

    Example:
        >>> AdapterDense(4, 2, bottleneck_size=1)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
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
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
    ) -> None:
        size(out_channels, "out_channels")
        adapter = AdapterLayer(out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype)
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, param_init_type, compute_dtype
        )
        self.mindpet_delta_adapter = adapter
        self.carry_delta({"bottleneck_size": bottleneck_size, "non_linearity": non_linearity})

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
    ) -> ShardPlan:
        """Record how the layer's operators are distributed and return the DTensor plan; see docs/delta.md.

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
            The plan; `plan.apply(mesh)` distributes the parameters.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        own = rules.given(rules.DENSE, locals())
        inner = self.mindpet_delta_adapter.shard(**rules.passed_on(rules.ADAPTER, locals()))
        return self.plan_with(own, inner)
