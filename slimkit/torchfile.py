"""PyTorch weight files (.pt .pth .pkl .bin), read with weights_only=True and nothing else, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from slimkit import bridge  # noqa: F401 - says in one line that torch is missing
from slimkit.core import files
from slimkit.core.checkpoint import torchfile
from slimkit.core.checkpoint.torchfile import tag_of as tag_of
from slimkit.core.checkpoint.weightfile import Array, Entry

import torch


class TorchWeightFile(torchfile.TorchFile):
    """One torch.save file of tensors; its data stay on the disk until a tensor is asked for."""

    def __init__(self, path: files.PathLike) -> None:
        super().__init__(path, torch)


def stored(tensor: torch.Tensor) -> Array:
    """A tensor's values in the stored form of weight files: NumPy, on the CPU, bfloat16 and float8 as bits."""
    return torchfile.stored(tensor, torch)


def described(name: str, tensor: torch.Tensor) -> tuple[Entry, Callable[[], Array]]:
    """A tensor's entry, and how its stored values are fetched; UnsupportedError for one that files cannot hold."""
    storable(tensor, f"tensor {name!r}")
    return Entry(tag_of(tensor), tuple(tensor.shape)), partial(stored, tensor)


def storable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor, or an UnsupportedError that says why a file of plain numbers cannot hold it, and what to do."""
    torchfile.storable(tensor, name, torch)
    return tensor


def restored(array: Array, dtype: str) -> torch.Tensor:
    """The tensor of a stored array; shares its memory."""
    return torchfile.restored(array, dtype, torch)


def write_torch(
    path: files.PathLike,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Any] | None = None,
    before: Callable[[Path], object] | None = None,
) -> None:
    """Write tensors, numbers and strings as one torch.save file, atomically; it loads with weights_only=True."""
    torchfile.write_torch(path, tensors, values, torch, before)
