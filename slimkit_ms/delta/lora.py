"""LoRADense: the dense layer with low-rank deltas."""

from __future__ import annotations

from typing import Any

from slimkit.core.delta import shard as rules
from slimkit.core.delta.layers import check_alpha, check_dropout, size
from slimkit.core.delta.spec import DEFAULT_NAME, LoraSpec, key
from slimkit_ms import bridge
from slimkit_ms.delta import initial
from slimkit_ms.delta.layer import DenseBase
from slimkit_ms.delta.named import LoraLayer
from slimkit_ms.delta.shard import record

import mindspore as ms
from mindspore import nn, ops

__all__ = ["LoRADense", "bridge"]


class LoRADense(LoraLayer, DenseBase):
    """A dense layer with a low-rank side branch: activation(x W' + bias + alpha / rank * dropout(x) a' b').

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        lora_rank: rows of a, columns of b.
        lora_alpha: constant factor, not 0; works like a learning rate.
        lora_dropout: share of the input dropped on the way into a, in [0, 1).
        lora_a_init: start of a (lora_rank, in_channels): a Tensor, a name, a number or an Initializer; "kaiming" is
            HeUniform(negative_slope=sqrt(5)).
        lora_b_init: start of b (out_channels, lora_rank); zero, so that training starts from the base.
        param_init_type: dtype of a and b: mindspore.float16 or mindspore.float32.
        compute_dtype: dtype of the computation: mindspore.float16, mindspore.float32, or None for the input's own.
        weight_init: start of the weight (out_channels, in_channels).
        bias_init: start of the bias (out_channels,).
        has_bias: whether there is a bias.
        activation: a name, a cell, a primitive or None; applied to the result.

    Raises:
        ArgumentTypeError: an argument is of the wrong type.
        ArgumentError: a size below 1, lora_alpha 0, lora_dropout outside [0, 1), an initial Tensor of another shape.
        ActivationError: an unknown activation (also a KeyError).

    Source:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Example:
        >>> layer = LoRADense(4, 2, lora_rank=2, lora_alpha=4)
        >>> layer(ms.ops.ones((3, 4))).shape
        (3, 2)
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
        param_init_type: Any = ms.float32,
        compute_dtype: Any = ms.float16,
        weight_init: Any = "normal",
        bias_init: Any = "zeros",
        has_bias: bool = True,
        activation: Any = None,
    ) -> None:
        size(in_channels, "in_channels")
        size(out_channels, "out_channels")
        size(lora_rank, "lora_rank")
        check_alpha(lora_alpha)
        check_dropout(lora_dropout)
        a_init = initial.kaiming() if isinstance(lora_a_init, str) and lora_a_init == "kaiming" else lora_a_init
        a_shape, b_shape = (lora_rank, in_channels), (out_channels, lora_rank)
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
        self._operators()
        self.start()
        self.mindpet_delta_lora_a = initial.parameter(a_init, a_shape, param_init_type, key("lora", "a"))
        self.mindpet_delta_lora_b = initial.parameter(lora_b_init, b_shape, param_init_type, key("lora", "b"))
        self.take(DEFAULT_NAME, LoraSpec(lora_rank, float(lora_alpha), lora_dropout))

    @classmethod
    def over(cls, dense: nn.Cell) -> LoRADense:
        """The layer that takes a dense layer's place, with its very weight and bias and no delta yet."""
        layer = cls.__new__(cls)
        layer._over(dense)
        layer._operators()
        layer.start()
        return layer

    def _operators(self) -> None:
        self.lora_a_matmul = ops.MatMul(transpose_b=True)
        self.lora_b_matmul = ops.MatMul(transpose_b=True)
        self.lora_mul = ops.Mul()
        self.lora_add = ops.Add()
        self.lora_dropout = nn.Dropout(p=0.0)

    def refresh(self) -> None:
        super().refresh()
        # Graph mode reads plain lists of names and numbers where PyNative could read the records themselves.
        parts = self._running
        specs = [self.specs[p.name] for p in parts]
        self.n_active = len(parts)
        self.part_names = [p.name for p in parts]
        self.part_scales = [p.scale for p in parts]
        self.part_kinds = ["dora" if s.dora else "keep" if s.keep_zeros else "plain" for s in specs]
        self.part_pissa = [s.init == "pissa" for s in specs]
        self.part_weights = [self.active[p.name] for p in parts]
        if parts and any(p.dropout for p in parts):
            self.lora_dropout = nn.Dropout(p=max(p.dropout for p in parts))

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_channels), (self.out_channels, rank)

    def product(self, a: Any, b: Any) -> Any:
        return b @ a

    def construct(self, x: Any) -> Any:
        shape = x.shape
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        flat = self.cast(self.reshape(x, (-1, shape[-1])), kind)
        out = self.matmul(flat, self.cast(self.weight, kind))
        if self.has_bias:
            out = self.bias_add(out, self.cast(self.bias, kind))
        for i in range(self.n_active):
            out = self.lora_add(out, self._side(i, flat, kind))
        if self.activation_flag:
            out = self.activation(out)
        return self.cast(self.reshape(out, shape[:-1] + (self.out_channels,)), x.dtype)

    def _side(self, i: int, flat: Any, kind: Any) -> Any:
        suffix = "" if self.part_names[i] == "default" else "_" + self.part_names[i]
        a = self.cast(getattr(self, "mindpet_delta_lora_a" + suffix), kind)
        b = self.cast(getattr(self, "mindpet_delta_lora_b" + suffix), kind)
        if self.part_pissa[i]:
            a = ops.concat((a, self.cast(getattr(self, "mindpet_delta_lora_a0" + suffix), kind)), 0)
            b = ops.concat((b, -self.cast(getattr(self, "mindpet_delta_lora_b0" + suffix), kind)), 1)
        dropped = self.lora_dropout(flat)
        if self.part_kinds[i] == "keep":
            mask = self.cast(self.weight != 0, kind)
            return self.matmul(dropped, self.part_scales[i] * ops.matmul(b, a) * mask)
        if self.part_kinds[i] == "dora":
            return self._dora(i, dropped, a, b, getattr(self, "mindpet_delta_lora_magnitude" + suffix), kind)
        low = self.lora_a_matmul(dropped, a)
        return self.lora_mul(self.lora_b_matmul(low, b), self.part_scales[i])

    def _dora(self, i: int, x: Any, a: Any, b: Any, magnitude: Any, kind: Any) -> Any:
        """What DoRA adds: m / |W + sBA| (W + sBA) x - W x, the length held constant (Liu et al. 2024, sec. 4.3)."""
        weight = self.cast(self.weight, kind)
        scale = self.part_scales[i] / self.part_weights[i]
        turned = weight + scale * ops.matmul(b, a)
        length = ops.stop_gradient(ops.sqrt(ops.reduce_sum(turned * turned, 1)))
        gain = self.cast(magnitude, kind) / length
        straight = self.matmul(x, weight)
        side = self.lora_b_matmul(self.lora_a_matmul(x, a), b) * scale
        return self.part_weights[i] * ((gain - 1) * straight + gain * side)

    def shard(
        self,
        strategy_org_dense_matmul: Any = None,
        strategy_org_bias_add: Any = None,
        strategy_lora_dropout: Any = None,
        strategy_lora_a_matmul: Any = None,
        strategy_lora_b_matmul: Any = None,
        strategy_lora_mul: Any = None,
        strategy_lora_add: Any = None,
        strategy_activation: Any = None,
    ) -> LoRADense:
        """Record how the layer's operators are distributed; it takes effect in (semi-)automatic parallel mode.

        Args:
            strategy_org_dense_matmul: ((batch, in), (out, in)) cuts of the matmul's two inputs (transpose_b).
            strategy_org_bias_add: ((batch, out), (out,)).
            strategy_lora_dropout: ((batch, in),).
            strategy_lora_a_matmul: ((batch, in), (rank, in)).
            strategy_lora_b_matmul: ((batch, rank), (out, rank)).
            strategy_lora_mul: ((batch, out), ()).
            strategy_lora_add: ((batch, out), (batch, out)).
            strategy_activation: ((batch, out),).

        Returns:
            The layer; `layer.strategies` holds what was recorded.

        Raises:
            ShardError: a strategy does not fit its operator, or the activation is LogSoftmax.
        """
        strategies = {
            "org_dense_matmul": strategy_org_dense_matmul,
            "org_bias_add": strategy_org_bias_add,
            "lora_dropout": strategy_lora_dropout,
            "lora_a_matmul": strategy_lora_a_matmul,
            "lora_b_matmul": strategy_lora_b_matmul,
            "lora_mul": strategy_lora_mul,
            "lora_add": strategy_lora_add,
            "activation": strategy_activation,
        }
        operators = {
            "org_dense_matmul": self.matmul,
            "org_bias_add": getattr(self, "bias_add", None),
            "lora_dropout": self.lora_dropout,
            "lora_a_matmul": self.lora_a_matmul,
            "lora_b_matmul": self.lora_b_matmul,
            "lora_mul": self.lora_mul,
            "lora_add": self.lora_add,
            "activation": self.activation,
        }
        sizes = {"k": self.in_channels, "n": self.out_channels}
        record(self, rules.LORA, strategies, sizes, operators)
        return self
