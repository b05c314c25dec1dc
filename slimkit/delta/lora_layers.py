"""LoRA on layers, each kind as the part that goes before the layer's own class."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta import shard as rules
from slimkit.core.delta.named import Part
from slimkit.core.delta.spec import LoraSpec, key
from slimkit.delta.fused import dora_linear, fuses, lora_linear
from slimkit.delta.named import LoraLayer, signed
from slimkit.delta.shard import ShardPlan, plan

import torch
from torch.nn import functional as F

__all__ = ["LoraConv1D", "LoraConv2d", "LoraEmbedding", "LoraLinear", "bridge"]


class LoraLinear(LoraLayer):
    """A linear layer with low-rank deltas: x W' + bias + scaling * dropout(x) a' b'."""

    reads = ((F.linear, 1, 0),)
    in_features: int
    out_features: int
    bias: Any

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        return (rank, self.in_features), (self.out_features, rank)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a in the layout of the weight."""
        return b @ a

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, LoraLinear):  # somebody kept this method, and the delta is off
            return type(self).forward(self, input)
        only = self._only
        if only is not None and not (self.training and only.dropout):
            a, b = getattr(self, only.a), getattr(self, only.b)
            return lora_linear(input, self.weight, self.bias, a, b, only.scale)
        if self._turns_alone(input):
            return self._turn(input)
        return self.acted(super().forward(input), input)  # type: ignore[misc]

    def _turns_alone(self, x: torch.Tensor) -> bool:
        """Whether the one delta is a DoRA that a single step can compute."""
        if len(self._running) != 1:
            return False
        part = self._running[0]
        spec = self.delta_specs[part.name]
        if not spec.dora or spec.bias or spec.init == "pissa" or (self.training and part.dropout):
            return False
        kind = self.weight.dtype
        fits = self.active_deltas[part.name] == 1 and kind.itemsize >= 4 and x.device == self.weight.device
        return fits and not torch.compiler.is_compiling() and fuses(x, self.weight, getattr(self, part.a))

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        part = self._running[0]
        magnitude = getattr(self, key("lora", "magnitude", part.name))
        a, b = getattr(self, part.a), getattr(self, part.b)
        return dora_linear(x, self.weight, self.bias, a, b, magnitude, part.scale)

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """Any number of deltas of any sort, one after the other."""
        return self._with_sides(out, x, self.weight, self.bias)

    def _with_sides(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, kind: torch.dtype | None = None
    ) -> torch.Tensor:
        plain = out
        for part in self._running:
            spec = self.delta_specs[part.name]
            dropped = F.dropout(x, part.dropout, self.training) if part.dropout else x
            a, b = (t.to(kind or t.dtype) for t in self._factors(part, x.device))
            wide = dropped.to(a.dtype)
            if spec.dora:
                side = self._dora(part, wide, dropped, a, b, plain if dropped is x else None, weight, bias)
            elif spec.keep_zeros:
                side = F.linear(wide, part.scale * (b @ a) * (weight != 0))
            else:
                side = F.linear(F.linear(wide, a), b, self.own_bias(part, b)) * part.scale
                side = side + F.linear(wide, self.rest(part, a)) if spec.rest else side
            out = out + side.to(out.dtype)
        return out

    def _dora(
        self, part: Part, x: Any, dropped: Any, a: Any, b: Any, out: Any, weight: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        """What DoRA adds: m / |W + sBA| (W + sBA) x - W x, the length held constant (Liu et al. 2024, sec. 4.3)."""
        scale = self.delta_specs[part.name].scaling
        # |W + sBA|^2 by rows without building B A: |W|^2 + 2s <W A', B> + s^2 <B A A', B>
        wide, a0, b0 = weight.detach().to(a.dtype), a.detach(), b.detach()
        square = (wide * wide).sum(1) + 2 * scale * ((wide @ a0.t()) * b0).sum(1)  # (out,)
        square = square + scale * scale * ((b0 @ (a0 @ a0.t())) * b0).sum(1)
        length = square.clamp_min(0).sqrt()
        gain = getattr(self, key("lora", "magnitude", part.name)).to(length) / length  # (out,)
        if out is None:
            straight = F.linear(dropped, weight)
        else:
            straight = out if bias is None else out - bias
        turned = F.linear(F.linear(x, a), b) * scale
        return self.active_deltas[part.name] * ((gain - 1) * straight.to(a.dtype) + gain * turned)

    def carried_activation(self) -> Any:
        """The activation that the layer itself applies behind the deltas; None for plain linear layers."""
        return None

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
    ) -> ShardPlan:
        """Record how the layer's operators are distributed and return the DTensor plan; see docs/delta.md.

        Args:
            strategy_org_dense_matmul: ((batch, in), (out, in)) cuts of the matmul's two inputs.
            strategy_org_bias_add: ((batch, out), (out,)).
            strategy_lora_dropout: ((batch, in),).
            strategy_lora_a_matmul: ((batch, in), (rank, in)).
            strategy_lora_b_matmul: ((batch, rank), (out, rank)).
            strategy_lora_mul: ((batch, out), ()).
            strategy_lora_add: ((batch, out), (batch, out)).
            strategy_activation: ((batch, out),).

        Returns:
            The plan; `plan.apply(mesh)` distributes the parameters.

        Raises:
            ShardError: a strategy does not fit its operator.
        """
        strategies = rules.given(rules.LORA, locals())
        name, spec = next(iter(self.delta_specs.items()))
        sizes = {"k": self.in_features, "n": self.out_features, "r": spec.rank}
        optional = {"org_bias_add": self.bias, "activation": self.carried_activation()}
        return plan(self, rules.LORA, strategies, sizes, rules.lora_parameters(name), optional)


class LoraEmbedding(LoraLayer):
    """An embedding with low-rank deltas: table[i] + scaling * b a[:, i].

    As in PEFT, a token of `padding_idx` is given the same sum, and trains nothing; its column of `a` starts at zero, so
    that what starts silent stays silent.
    """

    reads = ((F.embedding, 1, 0), (torch.embedding, 0, 1))
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a in the layout of the weight."""
        return (b @ a).t()

    def fill_start(self, a: torch.Tensor, b: torch.Tensor, spec: LoraSpec) -> None:
        """Give a and b their values to start from, in place."""
        super().fill_start(a, b, spec)
        if self.padding_idx is not None:
            a[:, self.padding_idx] = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, LoraEmbedding):
            return type(self).forward(self, input)
        return self.acted(super().forward(input), input)  # type: ignore[misc]

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """Any number of deltas, one after the other."""
        plain = out
        for part in self._running:
            a, b = self._factors(part, x.device)
            side = F.embedding(x, a.t(), self.padding_idx) @ b.t() * part.scale
            side = side + self._rest_of_rows(part, x, a) if self.delta_specs[part.name].rest else side
            if self.delta_specs[part.name].dora:
                side = self._turned(part, plain, side, self._gain(part, a, b))
            out = out + side.to(out.dtype)
        return out

    def _rest_of_rows(self, part: Part, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What a compressed delta adds to these rows; no others are unpacked."""
        signs, scale = (getattr(self, key("lora", p, part.name)) for p in ("signs", "scale"))
        at = x.to(signs.device)
        return self.active_deltas[part.name] * signed(signs[at], scale[at], tuple(self.weight.shape)).to(like)

    def _gain(self, part: Part, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(width,): DoRA's magnitudes over the lengths of the columns, without building the table's change."""
        scale, wide = self.delta_specs[part.name].scaling, self.weight.detach().to(a.dtype)
        a0, b0 = a.detach(), b.detach()
        square = (wide * wide).sum(0) + 2 * scale * ((a0 @ wide) * b0.t()).sum(0)
        square = square + scale * scale * ((b0 @ (a0 @ a0.t())) * b0).sum(1)
        return getattr(self, key("lora", "magnitude", part.name)).to(a) / square.clamp_min(0).sqrt()

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight.detach(), dim=0)  # an embedding's outputs are its columns

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0)


class LoraConv2d(LoraLayer):
    """A convolution with low-rank deltas: a is a convolution to r channels like the base's, b a 1x1 one."""

    reads = ((F.conv2d, 1, 0),)
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    bias: Any

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        return (rank, self.in_channels, *self.kernel_size), (self.out_channels, rank, 1, 1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a in the layout of the weight."""
        return torch.tensordot(b[:, :, 0, 0], a, dims=1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, LoraConv2d):
            return type(self).forward(self, input)
        return self.acted(super().forward(input), input)  # type: ignore[misc]

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """Any number of deltas, one after the other."""
        plain = out
        for part in self._running:
            a, b = self._factors(part, x.device)
            dropped = F.dropout(x, part.dropout, self.training) if part.dropout else x
            wide = dropped.to(a.dtype)
            side = F.conv2d(self._down(wide, a, low), b, self.own_bias(part, b)) * part.scale
            side = side + self._down(wide, self.rest(part, a), low) if self.delta_specs[part.name].rest else side
            if self.delta_specs[part.name].dora:
                straight = plain if self.bias is None else plain - self.bias.view(-1, 1, 1)
                if dropped is not x:
                    straight = self._down(wide, self.weight.to(a.dtype), low)
                base = self.weight.detach().to(a.dtype)
                length = self._lengths(
                    base + self.delta_specs[part.name].scaling * self.product(a.detach(), b.detach())
                )
                gain = getattr(self, key("lora", "magnitude", part.name)).to(length) / length
                side = self._turned(part, straight, side, gain.view(-1, 1, 1))
            out = out + side.to(out.dtype)
        return out

    def _down(self, x: torch.Tensor, weight: torch.Tensor, low: Any) -> torch.Tensor:
        """What the layer's own convolution gives with another weight and no bias."""
        return self._conv_forward(x, weight, None) if low is None else low(x, weight)

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1)

    def without_bias(self, given: list[Any]) -> list[Any]:
        """The arguments of a convolution without its bias, the third."""
        return [*given[:2], None, *given[3:]] if len(given) > 2 else given


class LoraConv1D(LoraLayer):
    """Hugging Face's Conv1D, a linear layer that stores its weight as (in, out), with low-rank deltas."""

    reads = ((torch.addmm, 2, 1),)
    bias: Any

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""
        return (rank, self.weight.shape[0]), (self.weight.shape[1], rank)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b @ a in the layout of the weight."""
        return (b @ a).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, LoraConv1D):
            return type(self).forward(self, x)
        only = self._only
        if only is not None and not (self.training and only.dropout):
            a, b = getattr(self, only.a), getattr(self, only.b)
            return lora_linear(x, self.weight.t(), self.bias, a, b, only.scale)
        return self.acted(super().forward(x), x)  # type: ignore[misc]

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """Any number of deltas of any sort, one after the other."""
        for part in self._running:
            a, b = self._factors(part, x.device)
            dropped = F.dropout(x, part.dropout, self.training) if part.dropout else x
            if self.delta_specs[part.name].dora:
                change = self.change(part, self.weight.to(a.dtype))
                side = F.linear(dropped.to(a.dtype), change.t())
            else:
                wide = dropped.to(a.dtype)
                side = F.linear(F.linear(wide, a), b, self.own_bias(part, b)) * part.scale
                side = side + F.linear(wide, self.rest(part, a).t()) if self.delta_specs[part.name].rest else side
            out = out + side.to(out.dtype)
        return out

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight.detach(), dim=0)  # stored transposed: outputs are columns

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0)

    def _matrix(self) -> torch.Tensor:
        return self.weight.detach().t()
