"""Blocks of a walk over files for which nothing is replayed, and how a block's new weights are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slimkit.stored import DTYPES

import torch


class DatalessBlock:
    """A block of a method that needs no data."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.changed: list[str] = []
        self.rows: Mapping[str, dict[str, Any]] | None = None
        self.feeds: list[tuple[str, ...]] = []
        self.joined: dict[str, str] = {}
        self.reached: Mapping[str, float] = {}

    def replay(self, names: Sequence[str], seen: Any, ended: Callable[[], None] | None = None) -> None:
        """No data."""

    def join(self) -> None:
        """No stream."""

    def outputs(self) -> Iterator[torch.Tensor]:
        """No batches."""
        return iter(())

    def trained(self) -> None:
        """Nothing to train by."""

    def advance(self) -> None:
        """No activations."""


class FinishedBlock(DatalessBlock):
    """A block that an earlier run finished."""

    def __init__(self, names: list[str], rows: dict[str, Any]) -> None:
        super().__init__(names)
        self.rows = rows


def write_tensors(handle: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file from the tensors' own memory: its library would hold the whole block a second time."""
    written = {dtype: name for name, dtype in DTYPES.items()}
    entries, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": written[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    handle.write(struct.pack("<Q", len(head)) + head)
    for tensor in tensors.values():
        handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
