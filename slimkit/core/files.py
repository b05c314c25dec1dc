"""Safe files: checked paths, atomic writes, digests, JSON and safetensors; no pickle anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import AbsolutePathError, FileFormatError, LinkPathError

PathLike = str | os.PathLike[str]
Array = np.ndarray[Any, Any]


def as_path(path: Any, name: str) -> Path:
    """A str or PathLike as a Path; TypeError for another type, ValueError when empty."""
    check.instance(path, (str, os.PathLike), name, "a str or path")
    if not os.fspath(path):
        check.wrong_value(name, "a non-empty path", path)
    return Path(path)


def save_directory(path: Any, name: str = "directory") -> Path:
    """Check the folder a checkpoint is saved to; it must be absolute and no symbolic link.

    Args:
        path: the folder; it need not exist yet.
        name: the argument's name, for the message.

    Returns:
        The folder as a Path, not created.

    Raises:
        ArgumentError: None or empty.
        ArgumentTypeError: not a str or path.
        AbsolutePathError: a relative path.
        LinkPathError: a symbolic link.

    Example:
        >>> save_directory("/tmp/run").name
        'run'
    """
    if path is None:
        check.wrong_value(name, "an absolute path", path)
    folder = as_path(path, name)
    if not folder.is_absolute():
        raise AbsolutePathError(f"{name} must be an absolute path. Received: {str(folder)!r}")
    if folder.is_symlink():
        raise LinkPathError(f"{name} must not be a symbolic link. Received: {str(folder)!r}")
    return folder


def readable_file(path: Any, name: str) -> Path:
    """Check a file that is about to be read: it exists, is a regular file and no symbolic link."""
    file = as_path(path, name)
    if file.is_symlink():
        raise LinkPathError(f"{name} must not be a symbolic link. Received: {str(file)!r}")
    if not file.is_file():
        raise FileFormatError(f"{name} must be an existing file. Received: {str(file)!r}")
    return file


def inside(folder: PathLike, relative: str, name: str) -> Path:
    """Join a file name that came from data to its folder; refuse one that leads outside."""
    base = Path(folder).resolve()
    target = (base / check.text(relative, name)).resolve()
    if base != target and base not in target.parents:
        check.wrong_value(name, f"a path inside {str(folder)!r}", relative)
    return target


@contextlib.contextmanager
def atomic_file(path: PathLike, mode: str = "wb", *, before: Callable[[], object] | None = None) -> Iterator[IO[Any]]:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; missing parent folders are made.
        mode: "wb" or "w" (UTF-8).
        before: called when the new file is on the disk, just before it takes the old one's place.

    Yields:
        A handle on a temporary file in the same folder, synced and renamed on success, removed on any error.

    Raises:
        LinkPathError: `path` is a symbolic link.
        OSError: the disk is full or the folder cannot be written.
    """
    target = Path(path)
    if target.is_symlink():
        raise LinkPathError(f"refusing to write through the symbolic link {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if before is not None:
            before()
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def place_file(source: PathLike, target: PathLike) -> None:
    """Move a finished file to its place on the same disk, so that a reader sees the old one or the new one.

    Args:
        source: a file in the target's folder or one below it.
        target: its place.

    Raises:
        LinkPathError: `target` is a symbolic link.
    """
    place_files([(source, target)])


def place_files(pairs: Sequence[tuple[PathLike, PathLike]]) -> None:
    """Move finished files that belong together to their places, as `place_file` does, in order.

    All of them are on the disk before the first one moves: a disk that is full at that moment leaves the old ones.

    Args:
        pairs: (source, target) of each.

    Raises:
        LinkPathError: a target is a symbolic link; nothing was moved.
    """
    for source, target in pairs:
        if Path(target).is_symlink():
            raise LinkPathError(f"refusing to write through the symbolic link {str(target)!r}")
        with open(source, "rb+") as handle:
            os.fsync(handle.fileno())
        os.chmod(source, 0o666 & ~_umask())
    for source, target in pairs:
        os.replace(source, target)
        _sync_folder(Path(target).parent)


@contextlib.contextmanager
def atomic_directory(path: PathLike) -> Iterator[Path]:
    """Fill a folder so that it appears whole or not at all; an existing folder of that name is replaced.

    Args:
        path: the folder.

    Yields:
        A temporary sibling folder to write into.

    Raises:
        LinkPathError: `path` is a symbolic link.
        OSError: the disk is full or the parent cannot be written.
    """
    target = Path(path)
    if target.is_symlink():
        raise LinkPathError(f"refusing to replace the symbolic link {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if target.exists():
            # rename(2) replaces only an empty folder, so the old one steps aside first.
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, aside / target.name)
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(aside / target.name, target)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; some file systems refuse to sync a folder, and lose nothing by it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically: indented, keys in the order given, NaN refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_file(path, "w") as handle:
        handle.write(text + "\n")


def read_json(path: PathLike, name: str = "path", limit_bytes: int = 256 << 20) -> Any:
    """Read a JSON file of bounded size; FileFormatError names the file when it is damaged."""
    file = readable_file(path, name)
    if file.stat().st_size > limit_bytes:
        raise FileFormatError(f"{file} is larger than {limit_bytes} bytes, which no such file should be.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"{file} is not a JSON file: {error}") from None


def write_tensors(path: PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write NumPy arrays as a safetensors file, atomically.

    Args:
        path: the file.
        tensors: name -> array of any shape, in any memory order.
        metadata: str -> str pairs for the header.
    """
    from safetensors.numpy import save

    data = save({k: np.asarray(v, order="C") for k, v in tensors.items()}, metadata=dict(metadata or {}))
    with atomic_file(path) as handle:
        handle.write(data)


def read_tensors(path: PathLike, name: str = "path") -> tuple[dict[str, Array], dict[str, str]]:
    """Read a safetensors file as NumPy arrays and its metadata; FileFormatError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    file = readable_file(path, name)
    try:
        with safe_open(str(file), framework="np") as handle:
            return {k: handle.get_tensor(k) for k in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from None


def digest_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _stream(handle)


def _stream(handle: IO[bytes]) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def digest_array(array: Array) -> str:
    """SHA-256 of an array's dtype, shape and values, in hexadecimal.

    Example:
        >>> digest_array(np.zeros(2)) == digest_array(np.zeros((2, 1)))
        False
    """
    array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()
