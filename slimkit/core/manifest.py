"""The sidecar of a checkpoint, FILE.manifest.json: names, shapes and digests of its tensors, checked on loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import FileFormatError
from slimkit.core.weightfile import Array, Entry, Weights

ENDING = ".manifest.json"
VERSION = 1


def sidecar(path: files.PathLike) -> Path:
    """Where the manifest of a file lies."""
    file = Path(path)
    return file.with_name(file.name + ENDING)


class Digests:
    """Takes the digest of each tensor while it passes by on its way to the file."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self.found: dict[str, str] = {}

    def passing(self, tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
        """The same tensors, in the same order."""
        for name, array in tensors:
            self.found[name] = files.digest_array(array)
            yield name, array

    def write(self, path: files.PathLike) -> None:
        """Write the manifest of the finished file beside it."""
        tensors = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": self.found[name]}
            for name, entry in self._entries.items()
        }
        value = {"version": VERSION, "file": Path(path).name, "bytes": Path(path).stat().st_size, "tensors": tensors}
        files.write_json(sidecar(path), value)


def forget(path: files.PathLike) -> None:
    """Remove the manifest of a file that is about to be replaced.

    A kill between the two writes then leaves a good file without a manifest, never one that its manifest disowns.
    """
    with contextlib.suppress(FileNotFoundError):
        sidecar(path).unlink()


class Manifest:
    """What the sidecar of an open checkpoint says, or nothing where there is none."""

    def __init__(self, path: files.PathLike) -> None:
        self.path = sidecar(path)
        self.tensors: dict[str, dict[str, Any]] | None = None
        if not (self.path.is_file() or self.path.is_symlink()):
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
        if self.tensors is not None and files.digest_array(array) != self.tensors[name].get("sha256"):
            raise self._refused(weights, name, "is damaged: its values are not those that were written")

    def check_all(self, weights: Weights) -> None:
        """Check every tensor, reading them one at a time; the first bad one is named."""
        self.check_names(weights)
        for name in weights.entries if self.tensors is not None else ():
            self.check(weights, name, weights.raw(name))

    def _refused(self, weights: Weights, name: str, why: str) -> FileFormatError:
        return FileFormatError(f"{weights.path}: tensor {name!r} {why} (by {self.path.name}).")
