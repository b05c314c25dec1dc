"""The sidecar of a checkpoint, FILE.manifest.json: names, shapes and digests of its tensors, checked on loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint.background import WORTH_A_THREAD_BYTES, BackgroundThread
from slimkit.core.checkpoint.weightfile import STORED, Array, Entry, Piece, Weights, parts
from slimkit.core.errors import FileFormatError

ENDING = ".manifest.json"
VERSION = 1


def sidecar(path: files.PathLike) -> Path:
    """Where the manifest of a file lies."""
    file = Path(path)
    return file.with_name(file.name + ENDING)


def _begun(entry: Entry) -> Any:
    """A digest that has seen a tensor's type and shape; its bytes follow."""
    return hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())


def _digest(array: Any, entry: Entry) -> str:
    digest = _begun(entry)
    for chunk in parts(array, entry):
        digest.update(chunk)
    return str(digest.hexdigest())


class Digests:
    """Takes the digest of each tensor while it is written to the file; a context, whose end ends its thread."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._digests: dict[str, Any] = {}
        self._beside = BackgroundThread()

    def passing(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same tensors, in the same order."""
        for name, array in tensors:
            if isinstance(array, Piece):
                yield name, Piece(array.shape, partial(self._chunks, name, array))
                continue
            entry = self._entries[name]
            array = np.asarray(array, STORED[entry.dtype], order="C")  # once, for the digest and for the file
            digest = self._digests[name] = _begun(entry)
            for whole in parts(array, entry):
                self._update(digest, whole)
            yield name, array
            if len(self._digests) < len(self._entries):
                self._beside.settle()  # or two fetched tensors would be held at once; the last one's file can be synced

    def _chunks(self, name: str, piece: Piece) -> Iterator[memoryview]:
        digest = self._digests[name] = _begun(self._entries[name])
        for chunk in piece.chunks():
            # Taken while this chunk is written and the next one read, which goes where the last one was.
            self._update(digest, chunk)
            yield chunk

    def _update(self, digest: Any, chunk: memoryview) -> None:
        if len(chunk) < WORTH_A_THREAD_BYTES:
            self._beside.settle()
            digest.update(chunk)
        else:
            self._beside.submit(partial(digest.update, chunk))

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._beside.__exit__(*raised)

    def write(self, path: files.PathLike) -> None:
        """Write the manifest of the finished file beside it."""
        self._beside.settle()
        tensors = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": self._digests[name].hexdigest()}
            for name, entry in self._entries.items()
        }
        value = {"version": VERSION, "file": Path(path).name, "bytes": Path(path).stat().st_size, "tensors": tensors}
        _write(sidecar(path), json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write(side: Path, text: str) -> None:
    # Renamed into place, yet not forced to the disk: two more waits for the disk would double the price of a small
    # checkpoint, and what a power cut may leave of it, nothing, counts as no manifest.
    temporary = side.with_name(f".{side.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, side)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def forget(path: files.PathLike) -> None:
    """Remove the manifest of a file that is about to be replaced."""
    with contextlib.suppress(FileNotFoundError):
        sidecar(path).unlink()


def _is_blank(side: Path) -> bool:
    """Whether a power cut took the content before it reached the disk: no bytes, or only zeros."""
    with open(side, "rb") as handle:
        return not handle.read(4096).strip(b"\0")


class Manifest:
    """What the sidecar of an open checkpoint says, or nothing where there is none."""

    def __init__(self, path: files.PathLike) -> None:
        self.path = sidecar(path)
        self.tensors: dict[str, dict[str, Any]] | None = None
        if not self.path.is_symlink() and (not self.path.is_file() or _is_blank(self.path)):
            return
        value = files.read_json(self.path, "the manifest")
        if not isinstance(value, dict) or value.get("version") != VERSION:
            found = value.get("version") if isinstance(value, dict) else type(value).__name__
            raise FileFormatError(f"{self.path} is no manifest of version {VERSION}. Received: {found!r}")
        tensors = value.get("tensors")
        if not isinstance(tensors, dict) or not all(isinstance(about, dict) for about in tensors.values()):
            raise FileFormatError(f"{self.path} lists no tensors.")
        self.tensors = tensors

    def check_names(self, weights: Weights) -> None:
        """Refuse a file that lacks a tensor, holds one more, or holds one of another shape or type."""
        for name, about in (self.tensors or {}).items():
            entry = weights.entries.get(name)
            if entry is None:
                raise self._refused(weights, name, "is missing: the file was cut short or replaced")
            if list(entry.shape) != about.get("shape") or entry.dtype != about.get("dtype"):
                raise self._refused(weights, name, f"has become {entry.dtype} {list(entry.shape)}")
        if self.tensors is not None:
            for name in weights.entries:
                if name not in self.tensors:
                    raise self._refused(weights, name, "was not there when the file was written")

    def check(self, weights: Weights, name: str, array: Array) -> None:
        """Refuse a tensor whose values are not those that were written."""
        if self.tensors is not None and _digest(array, weights.entries[name]) != self.tensors[name].get("sha256"):
            raise self._damaged(weights, name)

    def check_all(self, weights: Weights) -> None:
        """Check every tensor, reading them one at a time; the first bad one is named."""
        self.check_names(weights)
        for name, entry in weights.entries.items() if self.tensors is not None else ():
            if self.tensors and _digest(weights.piece(name), entry) != self.tensors[name].get("sha256"):
                raise self._damaged(weights, name)

    def _damaged(self, weights: Weights, name: str) -> FileFormatError:
        return self._refused(weights, name, "is damaged: its values are not those that were written")

    def _refused(self, weights: Weights, name: str, why: str) -> FileFormatError:
        return FileFormatError(f"{weights.path}: tensor {name!r} {why} (by {self.path.name}).")
