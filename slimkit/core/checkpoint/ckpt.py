"""MindSpore .ckpt files (protobuf wire format), read tensor by tensor and written as a stream, without MindSpore."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint.background import Outflow
from slimkit.core.checkpoint.weightfile import (
    STORED,
    Array,
    Entry,
    Piece,
    Weights,
    file_chunks,
    in_order,
    parts,
    read_into,
)
from slimkit.core.errors import FileFormatError, UnsupportedError

# Checkpoint { repeated Value value = 1 },
# Value { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 },
# TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }.
TYPES = {
    "BOOL": "Bool",
    "U8": "UInt8",
    "I8": "Int8",
    "U16": "UInt16",
    "I16": "Int16",
    "U32": "UInt32",
    "I32": "Int32",
    "U64": "UInt64",
    "I64": "Int64",
    "F16": "Float16",
    "F32": "Float32",
    "F64": "Float64",
    "BF16": "BFloat16",
}
TAGS = {name: tag for tag, name in TYPES.items()}

# Names the numbers that were plain Python values: {name: "int" | "float" | "bool"}. To MindSpore it is a string.
NUMBERS = "slimkit.numbers"
_NUMBER = {"int": ("I64", int), "float": ("F64", float), "bool": ("BOOL", bool)}

_SLICE_BYTES = 512 << 20  # a longer tensor is several records of one tag, as MindSpore writes it
_CIPHER = bytes.fromhex("d85e3a7f")
_TRAILER = 17  # b"crc_num" and ten bytes, most significant first


class Ckpt(Weights):
    """One .ckpt file: records are indexed by seeking over their contents, a checksum at its end is verified."""

    def __init__(self, path: files.PathLike) -> None:
        super().__init__(Path(path))
        self._handle: IO[bytes] = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._parts: dict[str, list[tuple[int, int]]] = {}
        try:
            self._index()
        except BaseException:
            self._handle.close()
            raise

    def _damaged(self, why: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is not a readable MindSpore checkpoint: {why}")

    def _index(self) -> None:
        end = os.fstat(self._handle.fileno()).st_size
        if self._at(0, min(4, end)) == _CIPHER:
            raise self._damaged("it is encrypted; decrypt it with mindspore.load_checkpoint(dec_key=...) first")
        if not end:
            raise self._damaged("it is empty")
        end = self._check_crc(end)
        strings: dict[str, tuple[int, int]] = {}
        last = ""
        position = 0
        while position < end:
            field, wire, begin, position = self._field(position, end)
            if (field, wire) != (1, 2):
                raise self._damaged(f"field {field} at byte {begin} is no record")
            tag, dims, kind, content = self._record(begin, position)
            offset, length = content
            if kind == "str":
                if tag in strings or tag in self._parts:
                    raise self._damaged(f"{tag!r} stands twice")
                strings[tag] = (offset, length)
            elif kind not in TAGS:
                raise self._damaged(f"tensor {tag!r} has the unknown element type {kind[:40]!r}")
            else:
                self._add(tag, dims, TAGS[kind], offset, length, follows=last == tag)
            last = tag
        if not self.entries and not strings:
            raise self._damaged("it holds no record")
        for tag, entry in self.entries.items():
            held = sum(length for _, length in self._parts[tag])
            if held != entry.nbytes:
                raise self._damaged(
                    f"tensor {tag!r} of shape {list(entry.shape)} needs {entry.nbytes} bytes, not {held}"
                )
        self._read_values(strings)

    def _check_crc(self, end: int) -> int:
        if end < _TRAILER:
            return end
        tail = self._at(end - _TRAILER, _TRAILER)
        if not tail.startswith(b"crc_num"):
            return end
        crc, left = 0, end - _TRAILER
        self._handle.seek(0)
        while left and (block := self._handle.read(min(1 << 20, left))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
        if crc != int.from_bytes(tail[7:], "big"):
            raise self._damaged("its checksum does not fit its bytes")
        return end - _TRAILER

    def _add(self, tag: str, dims: list[int], dtype: str, offset: int, length: int, *, follows: bool) -> None:
        # A number is written without dims, or as [0] by older versions.
        shape = () if dims == [0] and length == STORED[dtype].itemsize else tuple(dims)
        entry = Entry(dtype, shape)
        if tag in self._parts:
            if not follows or self.entries[tag] != entry:
                raise self._damaged(f"tensor {tag!r} stands twice")
            self._parts[tag].append((offset, length))
        else:
            self.entries[tag] = entry
            self._parts[tag] = [(offset, length)]

    def _read_values(self, strings: Mapping[str, tuple[int, int]]) -> None:
        for tag, (offset, length) in strings.items():
            if length % 4 or length > 1 << 26:
                raise self._damaged(f"string {tag!r} has {length} bytes")
            try:
                self.values[tag] = self._at(offset, length).decode("utf-32-le").rstrip("\0")
            except UnicodeDecodeError:
                raise self._damaged(f"string {tag!r} is no text") from None
        try:
            kinds = json.loads(self.values.pop(NUMBERS, "{}"))
            for tag, kind in kinds.items():
                self.values[tag] = _NUMBER[kind][1](self.raw(tag)[()])
                del self.entries[tag]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged(f"its record {NUMBERS!r} names what is not there") from None

    def _record(self, position: int, end: int) -> tuple[str, list[int], str, tuple[int, int]]:
        tag: str | None = None
        tensor: tuple[int, int] | None = None
        while position < end:
            field, wire, begin, position = self._field(position, end)
            if (field, wire) == (1, 2):
                tag = self._text(begin, position, 1 << 16)
            elif (field, wire) == (2, 2):
                tensor = (begin, position)
            elif (field, wire) == (3, 2):
                raise UnsupportedError(f"{self.path}: {tag!r} is a MapParameter, which slimkit does not read.")
            else:
                raise self._damaged(f"unknown field {field} at byte {begin}")
        if not tag or tensor is None:
            raise self._damaged(f"the record that ends at byte {end} has no name or no tensor")
        return tag, *self._tensor(tag, *tensor)

    def _tensor(self, tag: str, position: int, end: int) -> tuple[list[int], str, tuple[int, int]]:
        dims: list[int] = []
        kind = ""
        content: tuple[int, int] | None = None
        while position < end:
            field, wire, begin, position = self._field(position, end)
            if (field, wire) == (1, 0):
                dims.append(self._varint(begin, position)[0])
            elif (field, wire) == (1, 2):
                while begin < position:
                    length, begin = self._varint(begin, position)
                    dims.append(length)
            elif (field, wire) == (2, 2):
                kind = self._text(begin, position, 64)
            elif (field, wire) == (3, 2) and content is None:
                content = (begin, position - begin)
            else:
                raise self._damaged(f"unknown field {field} in tensor {tag!r}")
            if len(dims) > 64:
                raise self._damaged(f"tensor {tag!r} has more than 64 axes")
        if content is None:  # MindSpore leaves no content out, protobuf leaves an empty one out
            content = (end, 0)
        if any(length >= 1 << 62 for length in dims):
            raise self._damaged(f"tensor {tag!r} has a shape that is no size")
        return dims, kind, content

    def _field(self, position: int, end: int) -> tuple[int, int, int, int]:
        """(field, wire type, where its content begins, where it ends) of the field at a position."""
        key, begin = self._varint(position, end)
        wire = key & 7
        if wire == 0:
            return key >> 3, wire, begin, self._varint(begin, end)[1]
        if wire == 2:
            length, begin = self._varint(begin, end)
            if length > end - begin:
                raise self._damaged(f"the field at byte {position} is cut short")
            return key >> 3, wire, begin, begin + length
        raise self._damaged(f"wire type {wire} at byte {position}")

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for byte in self._at(position, min(10, end - position)):
            value |= (byte & 127) << shift
            position += 1
            if byte < 128:
                return value, position
            shift += 7
        raise self._damaged(f"the number before byte {position} does not end")

    def _text(self, begin: int, end: int, limit: int) -> str:
        try:
            if end - begin <= limit:
                return self._at(begin, end - begin).decode()
        except UnicodeDecodeError:
            pass
        raise self._damaged(f"the name at byte {begin} is no text")

    def _at(self, position: int, count: int) -> bytes:
        self._handle.seek(position)
        found = self._handle.read(count)
        if len(found) != count:
            raise self._damaged("it is cut short")
        return found

    def raw(self, name: str) -> Array:
        entry = self.entries[name]
        array = np.empty(entry.shape, STORED[entry.dtype])
        flat, at = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8), 0
        for offset, length in self._parts[name]:
            read_into(self._handle, offset, flat[at : at + length], f"{self.path}: tensor {name!r}")
            at += length
        return array

    def piece(self, name: str) -> Piece:
        spans = self._parts[name]
        return Piece(
            self.entries[name].shape, lambda: file_chunks(self._handle, spans, f"{self.path}: tensor {name!r}")
        )

    def close(self) -> None:
        self._handle.close()


def stream_ckpt(
    path: files.PathLike,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Any]],
    values: Mapping[str, Any] | None = None,
    *,
    crc: bool = False,
    before: Callable[[Path], object] | None = None,
) -> None:
    """Write a .ckpt file while its tensors are still being made, atomically.

    Args:
        path: the file.
        entries: name -> type and shape, in the order in which the file shall hold them.
        tensors: (name, stored array) in the same order; each is written and forgotten.
        values: numbers (int, float, bool) and strings to hold beside the tensors.
        crc: end the file with the checksum that ``mindspore.load_checkpoint(crc_check=True)`` verifies.
        before: called with the file when it is whole, just before it takes the old one's place.

    Raises:
        UnsupportedError: an element type that .ckpt files lack.
    """
    values = dict(values or {})
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise UnsupportedError(f"tensor {name!r}: .ckpt files cannot hold elements of type {entry.dtype}.")
    with files.atomic_file(path, before=before) as handle, Outflow(handle) as out:
        total = 0

        def put(*parts: bytes | memoryview) -> None:
            nonlocal total
            for part in parts:
                out.write(part)
                total = zlib.crc32(part, total) if crc else 0

        for name, array in in_order(entries, tensors):
            entry = entries[name]
            left, room = entry.nbytes, 0
            if not left:
                put(_head(name, entry.shape, TYPES[entry.dtype], 0))
            for part in parts(array, entry):
                while len(part):
                    if not room:
                        room = min(left, _SLICE_BYTES)
                        put(_head(name, entry.shape, TYPES[entry.dtype], room))
                    taken = min(room, len(part))
                    put(part[:taken])
                    left, room, part = left - taken, room - taken, part[taken:]
        kinds = {}
        for name, value in values.items():
            if isinstance(value, str):
                _put_text(put, name, value)
            else:
                kinds[name] = type(value).__name__
                dtype = _NUMBER[kinds[name]][0]
                content = np.array(value, STORED[dtype]).tobytes()
                put(_head(name, (), TYPES[dtype], len(content)), content)
        if kinds:
            _put_text(put, NUMBERS, json.dumps(kinds))
        if crc:
            out.write(b"crc_num" + total.to_bytes(10, "big"))


def _put_text(put: Any, name: str, text: str) -> None:
    content = (text or "\0").encode("utf-32-le")
    put(_head(name, (0,), "str", len(content)), content)


def _head(tag: str, shape: tuple[int, ...], kind: str, length: int) -> bytes:
    """Everything of a record before its content."""
    name, element = tag.encode(), kind.encode()
    tensor = b"".join(b"\x08" + _number(n) for n in shape)
    tensor += b"\x12" + _number(len(element)) + element + b"\x1a" + _number(length)
    value = b"\x0a" + _number(len(name)) + name + b"\x12" + _number(len(tensor) + length) + tensor
    return b"\x0a" + _number(len(value) + length) + value


def _number(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
