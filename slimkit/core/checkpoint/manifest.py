"""The sidecar of a checkpoint, FILE.manifest.json: names, shapes and digests of its tensors, checked on loading."""

from __future__ import annotations

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

    def announce(self, path: files.PathLike, finished: Path) -> None:
        """Write the manifest of a file that is about to take its place, beside the one of the file there."""
        self._beside.settle()
        tensors = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": self._digests[name].hexdigest()}
            for name, entry in self._entries.items()
        }
        value = {"version": VERSION, "file": Path(path).name, "bytes": finished.stat().st_size, "tensors": tensors}
        _write(_next(path), json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# A file and its manifest cannot be renamed by one call. So the new manifest lies beside the old one, as
# FILE.manifest.json.next, while the file is replaced: of the two, the one that the file's tensors agree with counts.


def _next(path: files.PathLike) -> Path:
    side = sidecar(path)
    return side.with_name(side.name + ".next")


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


def announce_none(path: files.PathLike) -> None:
    """Note that the file which is about to take its place has no manifest, where the one there has."""
    if sidecar(path).exists() or _next(path).exists():
        _write(_next(path), "")


def confirm(path: files.PathLike) -> None:
    """Let what was announced hold alone, now that the file is in its place."""
    coming = _next(path)
    if not coming.exists():
        return
    if _is_blank(coming):
        forget(path)
    else:
        os.replace(coming, sidecar(path))


def forget(path: files.PathLike) -> None:
    """Remove the manifests of a file that is gone, or has none."""
    for side in (sidecar(path), _next(path)):
        side.unlink(missing_ok=True)


def _is_blank(side: Path) -> bool:
    """Whether a power cut took the content before it reached the disk: no bytes, or only zeros."""
    with open(side, "rb") as handle:
        return not handle.read(4096).strip(b"\0")


class Manifest:
    """What the sidecar of an open checkpoint says, or nothing where there is none."""

    def __init__(self, weights: Weights) -> None:
        self.path = sidecar(weights.path)
        self.tensors = self._read(self.path)
        coming = _next(weights.path)
        if os.path.lexists(coming) and not self._vouches(weights):  # a kill came while the file was being replaced
            old, self.tensors = self.tensors, self._read(coming)
            if self.tensors is not None and not self._vouches(weights):
                self.tensors = old

    @staticmethod
    def _read(side: Path) -> dict[str, dict[str, Any]] | None:
        if not side.is_symlink() and (not side.is_file() or _is_blank(side)):
            return None
        value = files.read_json(side, "the manifest")
        if not isinstance(value, dict) or value.get("version") != VERSION:
            found = value.get("version") if isinstance(value, dict) else type(value).__name__
            raise FileFormatError(f"{side} is no manifest of version {VERSION}. Received: {found!r}")
        tensors = value.get("tensors")
        if not isinstance(tensors, dict) or not all(isinstance(about, dict) for about in tensors.values()):
            raise FileFormatError(f"{side} lists no tensors.")
        return tensors

    def _vouches(self, weights: Weights) -> bool:
        """Whether there is a manifest, and the file is the one that it was written for, by every tensor."""
        try:
            self.check_all(weights)
        except FileFormatError:
            return False
        return self.tensors is not None

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
