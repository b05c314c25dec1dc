"""LoRA on layers, each kind as the part that goes before the layer's own class."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.delta import shard as rules
from slimkit.core.delta.spec import LoraSpec
from slimkit_ms import bridge
from slimkit_ms.delta import initial
from slimkit_ms.delta.named import LoraLayer
from slimkit_ms.delta.shard import record

import mindspore as ms
from mindspore import mint, nn, ops

__all__ = ["LoraConv2d", "LoraDense", "LoraEmbedding", "LoraLinear", "LoraMintConv2d", "LoraTable", "bridge"]

_OPERATORS = ("lora_a_matmul", "lora_b_matmul", "lora_mul", "lora_add", "lora_dropout")


class LoraLinear(LoraLayer):
    """A dense layer with low-rank deltas: x W' + bias + scaling * dropout(x) a' b'."""

    worked_out = (*LoraLayer.worked_out, "part_names", "part_kinds", "part_pissa", "part_weights", *_OPERATORS)

    def start(self) -> None:
        """Begin without any delta."""
        # Operators of their own: each can be given a strategy by its name.
        self.lora_a_matmul, self.lora_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.lora_mul, self.lora_add = ops.Mul(), ops.Add()
        self.lora_dropout = nn.Dropout(p=0.0)
        super().start()

    def refresh(self) -> None:
        """Work out once what the construct would otherwise ask on every call."""
        super().refresh()
        parts = self._running
        specs = [self.delta_specs[p.name] for p in parts]
        self.part_names = [p.name for p in parts]
        self.part_kinds = ["dora" if s.dora else "keep" if s.keep_zeros else "plain" for s in specs]
        self.part_pissa = [s.init == "pissa" for s in specs]
        self.part_weights = [self.active_deltas[p.name] for p in parts]
        # The first delta's dropout is a cell, which can be given a strategy; the rate is that delta's own.
        first = self.part_rates[0] if parts else 0.0
        if self.lora_dropout.p != first:
            cut = getattr(self.lora_dropout.dropout, "in_strategy", None)  # a primitive has it once it was cut
            self.lora_dropout = nn.Dropout(p=first).set_train(self.training)
            if cut is not None:
                self.lora_dropout.dropout.shard(cut)

    def dropped(self, i: int, x: Any) -> Any:
        """The input of the i-th active delta, some of it dropped in training at that delta's own rate."""
        if i == 0:
            return self.lora_dropout(x)
        if self.part_rates[i] > 0 and self.training:
            return ops.dropout(x, p=self.part_rates[i], training=True)
        return x

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        n_out, n_in = self.weight.shape
        return (rank, n_in), (n_out, rank)

    def product(self, a: Any, b: Any) -> Any:
        """b @ a in the layout of the weight."""
        return b @ a

    def construct(self, x: Any) -> Any:
        out = self.plain_construct(x)
        if self.n_active > 0:
            flat = out.reshape((-1, out.shape[-1]))
            flat = self.with_deltas(flat, x.reshape((-1, x.shape[-1])), x.dtype)
            out = ops.cast(flat.reshape(out.shape), out.dtype)
        return out

    def with_deltas(self, out: Any, flat: Any, kind: Any) -> Any:
        """(n, out) of the plain layer for (n, in), and what every active delta adds to it."""
        for i in range(self.n_active):
            out = self.lora_add(out, self.side(i, flat, kind))
        return out

    def side(self, i: int, flat: Any, kind: Any) -> Any:
        """(n, out) that the i-th active delta adds for (n, in), computed in the dtype `kind`."""
        suffix = "" if self.part_names[i] == "default" else "_" + self.part_names[i]
        a = ops.cast(getattr(self, "mindpet_delta_lora_a" + suffix), kind)
        b = ops.cast(getattr(self, "mindpet_delta_lora_b" + suffix), kind)
        if self.part_pissa[i]:
            a = ops.concat((a, ops.cast(getattr(self, "mindpet_delta_lora_a0" + suffix), kind)), 0)
            b = ops.concat((b, -ops.cast(getattr(self, "mindpet_delta_lora_b0" + suffix), kind)), 1)
        dropped = self.dropped(i, flat)
        if self.part_kinds[i] == "keep":
            mask = ops.cast(self.weight != 0, kind)
            return ops.matmul(dropped, (self.part_scales[i] * ops.matmul(b, a) * mask).swapaxes(0, 1))
        if self.part_kinds[i] == "dora":
            return self.dora(i, dropped, a, b, getattr(self, "mindpet_delta_lora_magnitude" + suffix), kind)
        high = self.lora_b_matmul(self.lora_a_matmul(dropped, a), b)
        if self.part_biases[i] != "":
            high = high + ops.cast(getattr(self, self.part_biases[i]), kind)
        high = self.lora_mul(high, self.part_scales[i])
        if self.part_rests[i] != "":
            high = high + ops.matmul(dropped, ops.cast(self.rest(i), kind).swapaxes(0, 1))
        return high

    def dora(self, i: int, x: Any, a: Any, b: Any, magnitude: Any, kind: Any) -> Any:
        """What DoRA adds: m / |W + sBA| (W + sBA) x - W x, the length held constant (Liu et al. 2024, sec. 4.3)."""
        weight = ops.cast(self.weight, kind)
        scale = self.part_scales[i] / self.part_weights[i]
        turned = weight + scale * ops.matmul(b, a)
        length = ops.stop_gradient(ops.sqrt(ops.reduce_sum(turned * turned, 1)))
        gain = ops.cast(magnitude, kind) / length
        straight = ops.matmul(x, weight.swapaxes(0, 1))
        side = self.lora_b_matmul(self.lora_a_matmul(x, a), b) * scale
        return self.part_weights[i] * ((gain - 1) * straight + gain * side)


class LoraDense(LoraLinear):
    """`nn.Dense` with low-rank deltas, which come before the activation that it may carry."""

    compute_dtype: Any = None

    def construct(self, x: Any) -> Any:
        shape = x.shape
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        flat = ops.cast(self.reshape(x, (-1, shape[-1])), kind)
        out = self.matmul(flat, ops.cast(self.weight, kind))
        if self.has_bias:
            out = self.bias_add(out, ops.cast(self.bias, kind))
        out = self.with_deltas(out, flat, kind)
        if self.activation_flag:
            out = self.activation(out)
        return ops.cast(self.reshape(out, shape[:-1] + (out.shape[-1],)), x.dtype)

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
    ) -> Any:
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
        strategies = rules.given(rules.LORA, locals())
        operators = {
            "org_dense_matmul": self.matmul,
            "org_bias_add": self.bias_add if self.has_bias else None,
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


class LoraTable(LoraLayer):
    """Rows of a table with low-rank deltas: table[i] + scaling * b a[:, i].

    As in PEFT, a token of `padding_idx` is given the same sum, and trains nothing; its column of `a` starts at zero, so
    that what starts silent stays silent.
    """

    worked_out = (*LoraLayer.worked_out, "padded")

    def refresh(self) -> None:
        """Work out once what the construct would otherwise ask on every call."""
        super().refresh()
        self.padded = -1 if self.padding_idx is None else self.padding_idx % self.weight.shape[0]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        rows, width = self.weight.shape
        return (rank, rows), (width, rank)

    def product(self, a: Any, b: Any) -> Any:
        """b @ a in the layout of the weight."""
        return (b @ a).T

    def start_of(self, spec: LoraSpec) -> tuple[Any, Any]:
        """What a and b start from."""
        a, b = super().start_of(spec)
        if self.padded >= 0:
            a_shape, _ = self.shapes(spec.rank)
            values = bridge.as_numpy(initial.parameter(a, a_shape, ms.float32, "a").init_data())
            values[:, self.padded] = 0
            a = ms.Tensor(values)
        return a, b

    def construct(self, ids: Any) -> Any:
        out = self.plain_construct(ids)
        plain = out
        for i in range(self.n_active):
            a, b = self.halves(i, out.dtype)
            low = ops.gather(ops.transpose(a, (1, 0)), ids, 0)  # (..., r)
            if self.padded >= 0:
                silent = ops.expand_dims(ids == self.padded, -1)
                low = ops.where(silent, ops.stop_gradient(low), low)
            side = ops.matmul(low, ops.transpose(b, (1, 0))) * self.part_scales[i]
            if self.part_rests[i] != "":
                side = side + ops.cast(ops.gather(self.rest(i), ids, 0), side.dtype)
            if self.part_turns[i] != 0.0:
                side = self.turned(i, plain, side, ops.transpose(ops.matmul(b, a), (1, 0)))
            out = out + ops.cast(side, out.dtype)
        return out

    def turned(self, i: int, plain: Any, side: Any, product: Any) -> Any:
        """What DoRA adds to a row: gain (plain + side) - plain; an embedding's outputs are its columns."""
        share = self.part_turns[i]
        whole = ops.cast(self.weight, product.dtype) + self.part_scales[i] / share * product
        length = ops.stop_gradient(ops.sqrt(ops.reduce_sum(whole * whole, 0)))
        gain = getattr(self, self.part_lengths[i]) / length
        return share * ((gain - 1) * ops.cast(plain, side.dtype) + gain * (side / share))

    def _lengths(self, weight: Any) -> Any:
        return np.linalg.norm(weight, axis=0)

    def _per_output(self, values: Any) -> Any:
        return values[None]


class LoraEmbedding(LoraTable):
    """`nn.Embedding` with low-rank deltas."""

    @property
    def weight(self) -> Any:
        """The table, under the name that other layers use."""
        return self.embedding_table


class LoraConv(LoraLayer):
    """A convolution with low-rank deltas: a is a convolution to r channels like the base's, b a 1x1 one."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        return (rank, *self.weight.shape[1:]), (self.weight.shape[0], rank, 1, 1)

    def product(self, a: Any, b: Any) -> Any:
        """b @ a in the layout of the weight."""
        return np.tensordot(b[:, :, 0, 0], a, axes=1)

    def with_bias(self, i: int, high: Any) -> Any:
        """What b gives, with the bias that it may have of its own."""
        if self.part_biases[i] != "":
            high = high + getattr(self, self.part_biases[i]).reshape((1, -1, 1, 1))
        return high

    def turned(self, i: int, plain: Any, side: Any, a: Any, b: Any) -> Any:
        """What DoRA adds to the output `plain`: gain (plain - bias + side) - (plain - bias)."""
        share = self.part_turns[i]
        product = ops.matmul(b.reshape((b.shape[0], -1)), a.reshape((a.shape[0], -1)))  # (out, in * height * width)
        whole = ops.cast(self.weight, a.dtype).reshape(product.shape) + self.part_scales[i] / share * product
        length = ops.stop_gradient(ops.sqrt(ops.reduce_sum(whole * whole, 1)))
        gain = (getattr(self, self.part_lengths[i]) / length).reshape((1, -1, 1, 1))
        straight = plain
        if self.bias is not None:
            straight = plain - self.bias.reshape((1, -1, 1, 1))
        return share * ((gain - 1) * ops.cast(straight, side.dtype) + gain * (side / share))

    def _lengths(self, weight: Any) -> Any:
        return np.linalg.norm(weight.reshape(weight.shape[0], -1), axis=1)

    def _per_output(self, values: Any) -> Any:
        return values[:, None, None, None]


class LoraConv2d(LoraConv):
    """`nn.Conv2d` with low-rank deltas."""

    worked_out = (*LoraLayer.worked_out, "low_convs", "high_conv", "whole_conv")

    def refresh(self) -> None:
        """Work out once what the construct would otherwise ask on every call."""
        super().refresh()
        same = {
            "mode": 1,
            "pad_mode": self.pad_mode,
            "pad": self.padding,
            "stride": self.stride,
            "dilation": self.dilation,
        }
        ranks = [self.delta_specs[p.name].rank for p in self._running]
        self.low_convs = [ops.Conv2D(out_channel=r, kernel_size=self.kernel_size, **same) for r in ranks]
        self.high_conv = ops.Conv2D(out_channel=self.out_channels, kernel_size=1)
        self.whole_conv = ops.Conv2D(out_channel=self.out_channels, kernel_size=self.kernel_size, **same)

    def construct(self, x: Any) -> Any:
        out = self.plain_construct(x)
        plain = out
        for i in range(self.n_active):
            a, b = self.halves(i, out.dtype)
            low = self.low_convs[i](self.dropped(i, x), a)
            side = self.with_bias(i, self.high_conv(low, b)) * self.part_scales[i]
            if self.part_rests[i] != "":
                side = side + self.whole_conv(x, ops.cast(self.rest(i), side.dtype))
            if self.part_turns[i] != 0.0:
                side = self.turned(i, plain, side, a, b)
            out = out + side
        return out


class LoraMintConv2d(LoraConv):
    """`mint.nn.Conv2d` with low-rank deltas."""

    def construct(self, x: Any) -> Any:
        out = self.plain_construct(x)
        plain = out
        for i in range(self.n_active):
            a, b = self.halves(i, out.dtype)
            low = mint.nn.functional.conv2d(self.dropped(i, x), a, None, self.stride, self.padding, self.dilation)
            side = self.with_bias(i, mint.nn.functional.conv2d(low, b)) * self.part_scales[i]
            if self.part_rests[i] != "":
                whole = ops.cast(self.rest(i), side.dtype)
                side = side + mint.nn.functional.conv2d(x, whole, None, self.stride, self.padding, self.dilation)
            if self.part_turns[i] != 0.0:
                side = self.turned(i, plain, side, a, b)
            out = out + side
        return out
