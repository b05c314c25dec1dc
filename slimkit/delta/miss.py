"""MiSS on a torch layer: one small matrix shared by all shards of the inputs."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.delta.miss import MissSpec
from slimkit.delta.fused import computing
from slimkit.delta.summed import Summed

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ShardSum", "SharedMatrix", "bridge"]


class SharedMatrix(nn.Module):
    """The matrix (rank, outputs) that all shards share, or (rank, repeat); it starts at zero."""

    def __init__(self, outputs: int, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        spec = MissSpec(**options)
        self.outputs, self.dropout = outputs, spec.dropout
        self.mindpet_delta_miss_block = nn.Parameter(torch.zeros(spec.shape(outputs), dtype=dtype))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """(..., rank): the sum over the shards of (..., inputs)."""
        block = self.mindpet_delta_miss_block
        rank = block.shape[0]
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if left := -x.shape[-1] % rank:
            x = F.pad(x, (0, left))
        return x.unflatten(-1, (-1, rank)).sum(-2, dtype=computing(x.dtype, block.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) for (..., inputs): the shards' sum times the matrix."""
        low, block = self.sums(x), self.mindpet_delta_miss_block
        side = low @ block.to(low.device, low.dtype)
        width = block.shape[1]
        return side if width == self.outputs else side.repeat(*[1] * (side.ndim - 1), self.outputs // width)


class ShardSum(Summed):
    """A linear layer with MiSS."""

    delta_kind = "miss"
    word = "ShardSum"

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """The plain layer's output with the delta's own, which then never exists by itself."""
        block: Any = self.adapter.mindpet_delta_miss_block
        if not (block.shape[1] == out.shape[-1] and out.dtype == x.dtype == block.dtype and out.device == block.device):
            return super().acted(out, x, low)
        sums: Any = self.adapter.sums(x)
        flat = torch.addmm(out.reshape(-1, out.shape[-1]), sums.reshape(-1, sums.shape[-1]), block)
        return flat.view(out.shape)

    def side(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) that the delta adds for (..., inputs)."""
        found: torch.Tensor = self.adapter(x)
        return found

    def change(self) -> torch.Tensor:
        """(outputs, inputs): the matrix, repeated along the inputs, and along the outputs where it is narrower."""
        block = self.adapter.mindpet_delta_miss_block.detach()
        rank, width = block.shape
        place = block.device
        rows = torch.arange(self.in_features, device=place) % rank
        return block[rows][:, torch.arange(self.out_features, device=place) % width].t()
