"""LoRA on layers that are not dense layers: embeddings and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit_ms import bridge
from slimkit_ms.delta.layer import take_over
from slimkit_ms.delta.named import LoraLayer

from mindspore import mint, nn, ops

__all__ = ["LoRAConv2d", "LoRAEmbedding", "LoRAMintConv2d", "LoRAMintEmbedding", "bridge"]


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


class _OverTable(_Over):
    """Rows of a table with low-rank deltas: table[i] + scaling * b a[:, i]."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, width = self.weight.shape
        return (rank, rows), (width, rank)

    def product(self, a: Any, b: Any) -> Any:
        return (b @ a).T

    def with_deltas(self, out: Any, ids: Any) -> Any:
        """The rows of the table that were read, (..., width), and what the deltas add to them."""
        for i in range(self.n_active):
            a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
            side = ops.matmul(ops.gather(ops.transpose(a, (1, 0)), ids, 0), ops.transpose(b, (1, 0)))
            out = out + side * self.part_scales[i]
        return out


class LoRAEmbedding(_OverTable, nn.Embedding):
    """An embedding with low-rank deltas."""

    @property
    def weight(self) -> Any:
        """The table, under the name that other layers use."""
        return self.embedding_table

    def construct(self, ids: Any) -> Any:
        return self.with_deltas(super().construct(ids), ids)


class LoRAMintEmbedding(_OverTable, mint.nn.Embedding):
    """A mint embedding with low-rank deltas."""

    def construct(self, ids: Any) -> Any:
        return self.with_deltas(super().construct(ids), ids)


class _OverConv2d(_Over):
    """A convolution with low-rank deltas: a is a convolution to r channels like the base's, b a 1x1 one."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, *self.weight.shape[1:]), (self.weight.shape[0], rank, 1, 1)

    def product(self, a: Any, b: Any) -> Any:
        return np.tensordot(b[:, :, 0, 0], a, axes=1)

    def refresh(self) -> None:
        super().refresh()
        self.dropout_in = nn.Dropout(p=max((p.dropout for p in self._running), default=0.0))


class LoRAConv2d(_OverConv2d, nn.Conv2d):
    """A convolution with low-rank deltas."""

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

    def construct(self, x: Any) -> Any:
        out = super().construct(x)
        for i in range(self.n_active):
            a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
            low = self.low_convs[i](self.dropout_in(x), a)
            out = out + self.high_conv(low, b) * self.part_scales[i]
        return out


class LoRAMintConv2d(_OverConv2d, mint.nn.Conv2d):
    """A mint convolution with low-rank deltas."""

    def construct(self, x: Any) -> Any:
        out = super().construct(x)
        for i in range(self.n_active):
            a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
            low = mint.nn.functional.conv2d(self.dropout_in(x), a, None, self.stride, self.padding, self.dilation)
            out = out + mint.nn.functional.conv2d(low, b) * self.part_scales[i]
        return out
