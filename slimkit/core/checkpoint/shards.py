"""A checkpoint directory of safetensors shards: where each tensor lies, and copies with some tensors replaced."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files, traffic
from slimkit.core.checkpoint.openweights import INDEXES, WHOLE, read_index
from slimkit.core.checkpoint.weightfile import STORED, Array, Piece, decode, file_chunks
from slimkit.core.errors import FileFormatError, UnsupportedError

# Bytes copied at once.
PIECE = 1 << 22
HEADER_LIMIT_BYTES = 100 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie.

    Args:
        file: the shard.
        start, stop: byte offsets in it.
        dtype: as safetensors writes it.
        shape: the tensor's shape.
    """

    file: Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, Place]:
    """Name -> place of every tensor in a safetensors file; FileFormatError when it is damaged."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(HEADER_LIMIT_BYTES, size - 8):
            raise FileFormatError(f"{file} is not a readable safetensors file: its header is damaged.")
        try:
            entries = json.loads(handle.read(length))
            places = {name: _place(file, 8 + length, e) for name, e in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from None
    for name, place in places.items():
        kind = STORED.get(place.dtype)
        if kind is not None and place.stop - place.start != kind.itemsize * math.prod(place.shape):
            raise FileFormatError(
                f"{file} is not a readable safetensors file: {name!r} has {place.stop - place.start} bytes for "
                f"{place.dtype} {place.shape}."
            )
    if any(not 8 + length <= p.start <= p.stop <= size for p in places.values()):
        raise FileFormatError(f"{file} is not a readable safetensors file: it is shorter than its header says.")
    return places


def _place(file: Path, base: int, entry: Any) -> Place:
    start, stop = entry["data_offsets"]
    return Place(file, base + int(start), base + int(stop), str(entry["dtype"]), tuple(entry["shape"]))


def locate(directory: Path) -> dict[str, Place]:
    """Name -> place of every tensor in a checkpoint directory, sharded or not, in the files that transformers reads.

    Raises:
        FileFormatError: there is no safetensors file, or one is damaged or missing; a tensor that the index names is in
            none of them, or one is in two with different values.
    """
    whole, index = directory / WHOLE[0], directory / INDEXES[0]
    told: dict[str, str] = {}
    if whole.exists() or whole.is_symlink():
        names = [whole.name]
    elif index.exists():
        told = read_index(index)
        names = sorted(set(told.values()))
    else:
        names = [f.name for f in sorted(directory.glob("*.safetensors"))]
    if not names:
        raise FileFormatError(f"src must hold .safetensors weights. Received: {str(directory)!r}")
    places: dict[str, Place] = {}
    for name in names:
        for tensor, place in header(
            files.readable_file(files.inside(directory, name, "a shard's name"), "a shard")
        ).items():
            other = places.setdefault(tensor, place)
            if other is not place and not same_values(other, place):
                raise FileFormatError(
                    f"{directory} holds {tensor!r} twice, in {other.file.name} and {name}, with different values: take "
                    "the file away that is not meant"
                )
    lost = next((tensor for tensor in told if tensor not in places), None)
    if lost is not None:
        raise FileFormatError(f"{index} says that {told[lost]!r} holds {lost!r}, and no file does")
    return places


def same_values(one: Place, other: Place) -> bool:
    """Whether two tensors are equal in type, shape and every byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(piece_of(one).chunks(), piece_of(other).chunks(), strict=True))


def piece_of(place: Place) -> Piece:
    """The stored bytes of a tensor, to be passed on chunk by chunk."""

    def chunks() -> Iterator[memoryview]:
        with open(place.file, "rb", buffering=0) as handle:
            yield from file_chunks(handle, [(place.start, place.stop - place.start)], f"{place.file}: a tensor")

    return Piece(place.shape, chunks)


def sampled(place: Place, numbers: Sequence[int] | Array) -> Array:
    """Single values of a tensor, by their flat indices; no other is read.

    Args:
        place: where the tensor lies.
        numbers: flat indices.
    """
    kind = STORED[place.dtype]
    found = np.empty(len(numbers), kind)
    with open(place.file, "rb", buffering=0) as handle:
        for k, number in enumerate(numbers):
            handle.seek(place.start + int(number) * kind.itemsize)
            found[k] = np.frombuffer(handle.read(kind.itemsize), kind)[0]
    return decode(found, place.dtype)


def rewrite(source: Path, target: Path, replaced: Mapping[str, Place]) -> None:
    """Copy a shard with some tensors' bytes taken from elsewhere; header and order stay, so sizes must agree.

    Args:
        source: the shard.
        target: the new shard, written atomically.
        replaced: tensor -> where its new bytes lie.
    """
    places = sorted(header(source).items(), key=lambda item: item[1].start)
    with open(source, "rb") as old, files.atomic_file(target) as new:
        first = places[0][1].start if places else source.stat().st_size
        _copy(old, new, 0, first)
        for name, place in places:
            other = replaced.get(name)
            if other is None:
                _copy(old, new, place.start, place.stop)
                continue
            if (other.dtype, other.shape) != (place.dtype, place.shape):
                raise UnsupportedError(f"tensor {name!r} changed from {place.dtype} {place.shape} to {other.dtype}.")
            with open(other.file, "rb") as handle:
                _copy(handle, new, other.start, other.stop)
        _copy(old, new, places[-1][1].stop if places else first, source.stat().st_size)


def _copy(old: Any, new: Any, start: int, stop: int) -> None:
    old.seek(start)
    while start < stop:
        piece = old.read(min(PIECE, stop - start))
        if not piece:
            raise FileFormatError(f"{old.name} became shorter while it was read.")
        traffic.read(old.name, len(piece))
        new.write(piece)
        start += len(piece)
