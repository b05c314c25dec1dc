"""MiSS on a MindSpore layer: one small matrix shared by all shards of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.delta.miss import MissSpec, weight_change
from slimkit_ms import bridge
from slimkit_ms.delta.summed import Summed

import mindspore as ms
from mindspore import nn, ops

__all__ = ["ShardSum", "SharedMatrix", "bridge"]


class SharedMatrix(nn.Cell):
    """The matrix (rank, outputs) that all shards share, or (rank, repeat); it starts at zero."""

    def __init__(self, outputs: int, dtype: Any, **options: Any) -> None:
        super().__init__()
        spec = MissSpec(**options)
        self.rank, self.times, self.dropout = spec.rank, outputs // (spec.repeat or outputs), spec.dropout
        name = "mindpet_delta_miss_block"
        self.mindpet_delta_miss_block = ms.Parameter(ops.zeros(spec.shape(outputs), dtype), name=name)

    def construct(self, x: Any) -> Any:
        """(n, outputs) for (n, inputs): the shards' sum times the matrix."""
        if self.dropout > 0 and self.training:
            x = ops.dropout(x, p=self.dropout, training=True)
        left = -x.shape[1] % self.rank
        if left > 0:
            x = ops.concat((x, ops.zeros((x.shape[0], left), x.dtype)), 1)
        low = ops.reduce_sum(x.reshape((x.shape[0], -1, self.rank)), 1)  # (n, rank)
        side = ops.matmul(low, ops.cast(self.mindpet_delta_miss_block, x.dtype))
        return side if self.times == 1 else ops.tile(side, (1, self.times))


class ShardSum(Summed):
    """A dense layer with MiSS."""

    delta_kind = "miss"
    word = "ShardSum"

    def side(self, x: Any) -> Any:
        """(n, outputs) that the delta adds for (n, inputs)."""
        return self.mindpet_delta_miss(x)

    def change(self) -> Any:
        """(outputs, inputs): the matrix, repeated along the inputs, and along the outputs where it is narrower."""
        block = bridge.as_numpy(self.adapter.mindpet_delta_miss_block).astype(np.float32)
        return weight_change(block, *self.weight.shape)
