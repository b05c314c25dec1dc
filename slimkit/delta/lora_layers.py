"""LoRA on layers that are not linear layers: embeddings, convolutions and Hugging Face's Conv1D."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.delta.fused import lora_linear
from slimkit.delta.named import LoraLayer

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["LoRAConv1D", "LoRAConv2d", "LoRAEmbedding", "bridge"]


class _Over(LoraLayer):
    """Takes a layer's place by sharing everything it holds."""

    @classmethod
    def over(cls, layer: nn.Module) -> Any:
        """The layer that takes another's place, with its very parameters and settings and no delta yet."""
        new: Any = cls.__new__(cls)
        nn.Module.__init__(new)
        mine = ("_parameters", "_buffers", "_modules")
        new.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in mine})
        new._parameters, new._buffers = dict(layer._parameters), dict(layer._buffers)
        new.stand_for(layer)
        new.start()
        return new


class LoRAEmbedding(_Over, nn.Embedding):
    """An embedding with low-rank deltas: table[i] + scaling * b a[:, i]."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b @ a).t()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        for part in self._running:
            a, b = self._factors(part)
            side = F.embedding(input, a.t()) @ b.t() * part.scale
            if self.padding_idx is not None and part.name in self.specs:
                side = side.masked_fill((input == self.padding_idx).unsqueeze(-1), 0.0)
            out = out + side.to(out.dtype)
        return out

    def change(self, part: Any, base: torch.Tensor) -> torch.Tensor:
        delta = super().change(part, base)
        if self.padding_idx is not None:
            delta[self.padding_idx] = 0
        return delta


class LoRAConv2d(_Over, nn.Conv2d):
    """A convolution with low-rank deltas: a is a convolution to r channels like the base's, b a 1x1 one."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_channels, *self.kernel_size), (self.out_channels, rank, 1, 1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(b[:, :, 0, 0], a, dims=1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        for part in self._running:
            a, b = self._factors(part)
            dropped = F.dropout(input, part.dropout, self.training) if part.dropout else input
            side = F.conv2d(self._conv_forward(dropped.to(a.dtype), a, None), b) * part.scale
            out = out + side.to(out.dtype)
        return out


class LoRAConv1D(_Over, nn.Module):
    """Hugging Face's Conv1D, a linear layer that stores its weight as (in, out), with low-rank deltas."""

    nf: int

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.weight.shape[0]), (self.weight.shape[1], rank)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b @ a).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.t()
        if self._only is not None and not (self.training and self._only.dropout):
            a, b = getattr(self, self._only.a), getattr(self, self._only.b)
            return lora_linear(x, weight, self.bias, a, b, self._only.scale)
        out = F.linear(x, weight, self.bias)
        for part in self._running:
            a, b = self._factors(part)
            dropped = F.dropout(x, part.dropout, self.training) if part.dropout else x
            if self.specs[part.name].dora:
                change = self.change(part, self.weight.to(a.dtype))
                side = F.linear(dropped.to(a.dtype), change.t())
            else:
                side = F.linear(F.linear(dropped.to(a.dtype), a), b) * part.scale
            out = out + side.to(out.dtype)
        return out

    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight.detach(), dim=0)  # stored transposed: outputs are columns

    def _per_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.unsqueeze(0)

    def _matrix(self) -> torch.Tensor:
        return self.weight.detach().t()
