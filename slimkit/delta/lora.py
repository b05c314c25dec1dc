"""LoRADense: the linear layer with low-rank deltas."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta.layers import check_lora_dense
from slimkit.core.delta.spec import DEFAULT_NAME, LoraSpec
from slimkit.delta import initial
from slimkit.delta.layer import DenseBase
from slimkit.delta.lora_layers import LoraLinear

import torch
from torch.nn import functional as F

__all__ = ["LoRADense", "bridge"]


class LoRADense(LoraLinear, DenseBase):
    """A linear layer with a low-rank side branch: activation(x W' + bias + alpha / rank * dropout(x) a' b').

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        lora_rank: rows of a, columns of b.
        lora_alpha: constant factor, not 0; works like a learning rate.
        lora_dropout: share of the input dropped on the way into a, in [0, 1).
        lora_a_init: start of a (lora_rank, in_channels): a tensor, a name, a number, or a function that fills a
            tensor; "kaiming" is He-uniform with negative slope sqrt(5).
        lora_b_init: start of b (out_channels, lora_rank); zero, so that training starts from the base.
        param_init_type: dtype of a and b: torch.float16 or torch.float32.
        compute_dtype: dtype of the computation: torch.float16, torch.float32, or None for the input's own.
        weight_init: start of the weight (out_channels, in_channels).
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a module or None; applied to the result.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, lora_alpha 0, lora_dropout outside [0, 1), an initial tensor of another shape.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Example:
        >>> layer = LoRADense(4, 2, lora_rank=2, lora_alpha=4)
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        lora_a_init: Any = "kaiming",
        lora_b_init: Any = "zeros",
        param_init_type: Any = torch.float32,
        compute_dtype: Any = None,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
    ) -> None:
        a_shape, b_shape = check_lora_dense(in_channels, out_channels, lora_rank, lora_alpha, lora_dropout)
        a_init = initial.kaiming if isinstance(lora_a_init, str) and lora_a_init == "kaiming" else lora_a_init
        initial.check_initial(a_init, "lora_a_init", a_shape, "(lora_rank, in_channels)")
        initial.check_initial(lora_b_init, "lora_b_init", b_shape, "(out_channels, lora_rank)")
        DenseBase.__init__(
            self,
            in_channels,
            out_channels,
            weight_init,
            bias_init,
            has_bias,
            activation,
            param_init_type,
            compute_dtype,
        )
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.start()
        self.mindpet_delta_lora_a = initial.parameter(a_init, a_shape, param_init_type)
        self.mindpet_delta_lora_b = initial.parameter(lora_b_init, b_shape, param_init_type)
        self.delta_specs[DEFAULT_NAME] = LoraSpec(lora_rank, float(lora_alpha), lora_dropout)
        self.set_active_deltas({DEFAULT_NAME: 1.0})

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input) if self.compute_dtype is None else self._cast(input)
        return out if self.activation is None else self.activation(out)

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(kind)
        given, weight = x.to(kind), self.weight.to(kind)
        return self._with_sides(F.linear(given, weight, bias), given, weight, bias, kind).to(x.dtype)

    def carried_activation(self) -> Any:
        return self.activation
