"""Weights tensor by tensor: element types, the safetensors reader and writer, several files as one; no framework."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from slimkit.core import files, traffic
from slimkit.core.checkpoint.background import Outflow
from slimkit.core.errors import FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]

# Element types by their safetensors names; NumPy has none for bfloat16 and float8, whose bits are kept as integers.
STORED: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("<u1"),
    "F8_E5M2": np.dtype("<u1"),
}
_TAGS = {dtype: tag for tag, dtype in STORED.items() if tag not in ("BF16", "F8_E4M3", "F8_E5M2")}

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors format itself
CHUNK_BYTES = 4 << 20  # small enough to stay in a processor's cache between reading, hashing and writing


@dataclass(frozen=True)
class Entry:
    """One tensor of a weight file: its element type (a key of STORED) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return self.size * STORED[self.dtype].itemsize


def tag_of(array: Array) -> str:
    """The element type's name of a NumPy array; UnsupportedError for one that weight files cannot hold.

    Example:
        >>> tag_of(np.zeros(1, np.float32))
        'F32'
    """
    tag = _TAGS.get(array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype)
    if tag is None:
        raise UnsupportedError(f"weight files cannot hold elements of type {array.dtype}.")
    return tag


def decode(stored: Array, dtype: str) -> Array:
    """Numbers out of their stored form: bfloat16 bits become float32, everything else stays as it is.

    Example:
        >>> decode(np.array([0x3F80], np.uint16), "BF16")
        array([1.], dtype=float32)
    """
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if dtype.startswith("F8"):
        raise UnsupportedError(f"tensors of type {dtype} can be copied as they are, not computed with.")
    return stored


def encode(values: Array, dtype: str) -> Array:
    """The stored form of numbers: bfloat16 rounds to nearest even as the frameworks do.

    Example:
        >>> hex(int(encode(np.array([1.0], np.float32), "BF16")[0]))
        '0x3f80'
    """
    if dtype == "BF16":
        bits = np.asarray(values, np.float32, order="C").view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    if dtype.startswith("F8"):
        raise UnsupportedError(f"tensors of type {dtype} can be copied as they are, not computed with.")
    return np.asarray(values, STORED[dtype], order="C")


class Weights:
    """An open weight file: names and shapes at once, values one tensor at a time.

    Subclasses fill `entries` and define `raw`. Use as a context manager, or call `close`.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    values: dict[str, Any]  # numbers and strings stored beside the tensors

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = {}
        self.metadata = {}
        self.values = {}

    def raw(self, name: str) -> Array:
        """One tensor in its stored form, in memory of its own; bfloat16 as uint16 bits."""
        raise NotImplementedError

    def read(self, name: str) -> Array:
        """One tensor as numbers; bfloat16 as float32, chunk by chunk, so that both forms are never held at once."""
        entry = self.entries[name]
        if entry.dtype != "BF16":
            return decode(self.raw(name), entry.dtype)
        array = np.empty(entry.shape, np.float32)
        flat, at = array.reshape(-1), 0
        for chunk in self.piece(name).chunks():
            stored = np.frombuffer(chunk, STORED["BF16"])
            flat[at : at + len(stored)] = decode(stored, "BF16")
            at += len(stored)
        return array

    def piece(self, name: str) -> Piece:
        """One tensor's stored bytes, to be passed on."""
        shape = self.entries[name].shape
        return Piece(shape, lambda: parts(self.raw(name), self.entries[name]))

    def verify(self, names: Iterable[str]) -> None:
        """Read tensors once and forget them, so that a damaged one is found before anything is changed."""
        for name in names:
            for _ in self.piece(name).chunks():
                pass

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Arrays(Weights):
    """Weights that are in memory already: name -> array, or (array, element type) for bfloat16 bits."""

    def __init__(self, tensors: Mapping[str, Any], path: Path | None = None) -> None:
        super().__init__(path or Path("memory"))
        self._tensors: dict[str, Array] = {}
        for name, value in tensors.items():
            array, dtype = value if isinstance(value, tuple) else (np.asarray(value), None)
            self._tensors[name] = array
            self.entries[name] = Entry(dtype or tag_of(array), tuple(array.shape))

    def raw(self, name: str) -> Array:
        return self._tensors[name]


class Safetensors(Weights):
    """One .safetensors file; every number of its header is checked before a byte of data is read."""

    def __init__(self, path: files.PathLike) -> None:
        super().__init__(Path(path))
        self._handle: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._begin, self._offsets = self._header()
        except BaseException:
            self._handle.close()
            raise

    def _damaged(self, why: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is not a readable safetensors file: {why}")

    def _header(self) -> tuple[int, dict[str, int]]:
        size = os.fstat(self._handle.fileno()).st_size
        length = int.from_bytes(self._handle.read(8), "little")
        if size < 10 or length > min(MAX_HEADER_BYTES, size - 8):
            raise self._damaged(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(self._handle.read(length).decode(), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({str(error)[:200]})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("its metadata are not strings")
        self.metadata = metadata
        spans: list[tuple[int, int, str]] = []
        for name, about in header.items():
            entry, first, last = self._entry(name, about)
            self.entries[name] = entry
            spans.append((first, last, name))
        at = 0
        for first, last, name in sorted(spans):
            if first != at:
                raise self._damaged(f"tensor {name!r} begins at byte {first} where {at} was expected")
            at = last
        if at != size - 8 - length:
            raise self._damaged(f"its tensors hold {at} bytes, the file has {size - 8 - length}")
        return 8 + length, {name: first for first, _, name in spans}

    def _entry(self, name: str, about: Any) -> tuple[Entry, int, int]:
        try:
            dtype, shape, (first, last) = about["dtype"], about["shape"], about["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._damaged(f"tensor {name!r} lacks dtype, shape or offsets") from None
        if dtype not in STORED:
            raise self._damaged(f"tensor {name!r} has the unknown element type {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or not all(_is_size(n) for n in (*shape, first, last)) or len(shape) > 64:
            raise self._damaged(f"tensor {name!r} has a shape or offsets that are no sizes")
        entry = Entry(dtype, tuple(shape))
        if last - first != entry.nbytes:
            raise self._damaged(f"tensor {name!r} of shape {shape} needs {entry.nbytes} bytes, not {last - first}")
        return entry, first, last

    def raw(self, name: str) -> Array:
        entry = self.entries[name]
        array = np.empty(entry.shape, STORED[entry.dtype])
        read_into(self._handle, self._begin + self._offsets[name], array, f"{self.path}: tensor {name!r}")
        return array

    def piece(self, name: str) -> Piece:
        entry = self.entries[name]
        span = (self._begin + self._offsets[name], entry.nbytes)
        return Piece(entry.shape, lambda: file_chunks(self._handle, [span], f"{self.path}: tensor {name!r}"))

    def close(self) -> None:
        self._handle.close()


class Sharded(Weights):
    """Several weight files behind one index; a shard is opened when one of its tensors is first asked for."""

    def __init__(self, path: Path, shards: Mapping[str, Weights], home: Mapping[str, str]) -> None:
        super().__init__(path)
        self._shards = dict(shards)
        self._home = dict(home)
        for name, shard in home.items():
            if name not in self._shards[shard].entries:
                raise FileFormatError(f"{path} says that {shard!r} holds {name!r}, which it does not.")
            self.entries[name] = self._shards[shard].entries[name]
        for shard, opened in self._shards.items():
            for name in opened.entries.keys() & self.entries.keys():
                if shard != home[name] and not self._same(name, shard):
                    raise FileFormatError(
                        f"{path} says that {home[name]!r} holds {name!r}, and so does {shard!r}, with other values: "
                        "take the file away that is not meant"
                    )

    def _same(self, name: str, shard: str) -> bool:
        """Whether a tensor lies in another shard with the same type, shape and bytes."""
        here, there = self._shards[self._home[name]], self._shards[shard]
        return here.entries[name] == there.entries[name] and here.raw(name).tobytes() == there.raw(name).tobytes()

    def raw(self, name: str) -> Array:
        return self._shards[self._home[name]].raw(name)

    def piece(self, name: str) -> Piece:
        return self._shards[self._home[name]].piece(name)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def read_into(handle: IO[bytes], offset: int, array: Array, what: str) -> None:
    """Fill an array from a place in a file, in place; FileFormatError when the file ends early."""
    handle.seek(offset)
    if not array.nbytes:
        return
    rest = array.reshape(-1).view(np.uint8).data
    while len(rest):
        count = handle.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise FileFormatError(f"{what} is cut short.")
        rest = rest[count:]
    traffic.read(handle.name, array.nbytes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key[:80]!r} stands twice")
        seen[key] = value
    return seen


def stream_safetensors(
    path: files.PathLike,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
    *,
    before: Callable[[Path], object] | None = None,
) -> None:
    """Write a safetensors file while its tensors are still being made, atomically.

    Args:
        path: the file.
        entries: name -> type and shape, in the order in which the file shall hold them.
        tensors: (name, stored array) in the same order; each is written and forgotten.
        metadata: str -> str pairs for the header.
        before: called with the file when it is whole, just before it takes the old one's place.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    with files.atomic_file(path, before=before) as handle, Outflow(handle) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, array in in_order(entries, tensors):
            for part in parts(array, entries[name]):
                out.write(part)


class Piece:
    """The stored bytes of one tensor that passes from file to file without ever being held whole.

    Args:
        shape: the tensor's shape.
        chunks: gives its bytes in order; each view is good until the next but one is asked for.
    """

    def __init__(self, shape: tuple[int, ...], chunks: Callable[[], Iterator[memoryview]]) -> None:
        self.shape = shape
        self.chunks = chunks


def in_order(entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Pass tensors on while checking that they are the announced ones, all of them, in order."""
    expected = iter(entries)
    for name, array in tensors:
        if name != next(expected, None) or tuple(array.shape) != entries[name].shape:
            raise ValueError(f"tensor {name!r} was not announced at this place")
        yield name, array
    if (left := next(expected, None)) is not None:
        raise ValueError(f"tensor {left!r} was announced and never came")


def parts(array: Any, entry: Entry) -> Iterator[memoryview]:
    """The bytes of a tensor for its file, little-endian: at once, or chunk by chunk for a Piece."""
    if isinstance(array, Piece):
        passed = 0
        for chunk in array.chunks():
            passed += len(chunk)
            yield chunk
        if passed != entry.nbytes:
            raise ValueError(f"{passed} bytes came where {entry.nbytes} were announced")
    elif array.size:
        yield np.asarray(array, STORED[entry.dtype], order="C").reshape(-1).view(np.uint8).data


def file_chunks(handle: IO[bytes], spans: Iterable[tuple[int, int]], what: str) -> Iterator[memoryview]:
    """The bytes of some spans (offset, length) of a file, through two buffers that are filled in turn."""
    buffers: list[Array] = []
    for offset, length in spans:
        for at in range(0, length, CHUNK_BYTES):
            size = min(CHUNK_BYTES, length - at)
            buffers.append(buffers.pop(0) if len(buffers) > 1 else np.empty(size, np.uint8))
            if len(buffers[-1]) < size:
                buffers[-1] = np.empty(size, np.uint8)
            part = buffers[-1][:size]
            read_into(handle, offset + at, part, what)
            yield part.data
