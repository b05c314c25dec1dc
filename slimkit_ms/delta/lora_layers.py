"""LoRA on layers that are not dense layers: embeddings and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit_ms import bridge
from slimkit_ms.delta.layer import take_over
from slimkit_ms.delta.named import LoraLayer

from mindspore import nn, ops

__all__ = ["LoRAConv2d", "LoRAEmbedding", "bridge"]


class _Over(LoraLayer):
    """Takes a layer's place by sharing everything it holds."""

    @classmethod
    def over(cls, layer: nn.Cell) -> Any:
        """The layer that takes another's place, with its very parameters and settings and no delta yet."""
        new: Any = cls.__new__(cls)
        take_over(new, layer)
        new.start()
        return new

    def refresh(self) -> None:
        super().refresh()
        self.n_active = len(self._running)
        self.part_a = [p.a for p in self._running]
        self.part_b = [p.b for p in self._running]
        self.part_scales = [p.scale for p in self._running]


class LoRAEmbedding(_Over, nn.Embedding):
    """An embedding with low-rank deltas: table[i] + scaling * b a[:, i]."""

    @property
    def weight(self) -> Any:
        """The table, under the name that other layers use."""
        return self.embedding_table

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.vocab_size), (self.embedding_size, rank)

    def product(self, a: Any, b: Any) -> Any:
        return (b @ a).T

    def construct(self, ids: Any) -> Any:
        out = super().construct(ids)
        for i in range(self.n_active):
            a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
            side = ops.matmul(ops.gather(ops.transpose(a, (1, 0)), ids, 0), ops.transpose(b, (1, 0)))
            out = out + side * self.part_scales[i]
        return out


class LoRAConv2d(_Over, nn.Conv2d):
    """A convolution with low-rank deltas: a is a convolution to r channels like the base's, b a 1x1 one."""

    def refresh(self) -> None:
        super().refresh()
        same = {
            "mode": 1,
            "pad_mode": self.pad_mode,
            "pad": self.padding,
            "stride": self.stride,
            "dilation": self.dilation,
        }
        ranks = [self.specs[p.name].rank for p in self._running]
        self.low_convs = [ops.Conv2D(out_channel=r, kernel_size=self.kernel_size, **same) for r in ranks]
        self.high_conv = ops.Conv2D(out_channel=self.out_channels, kernel_size=1)
        self.dropout_in = nn.Dropout(p=max((p.dropout for p in self._running), default=0.0))

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_channels, *self.kernel_size), (self.out_channels, rank, 1, 1)

    def product(self, a: Any, b: Any) -> Any:
        return np.tensordot(b[:, :, 0, 0], a, axes=1)

    def construct(self, x: Any) -> Any:
        out = super().construct(x)
        for i in range(self.n_active):
            a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
            low = self.low_convs[i](self.dropout_in(x), a)
            out = out + self.high_conv(low, b) * self.part_scales[i]
        return out
