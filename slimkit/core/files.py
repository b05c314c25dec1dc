"""Safe files: checked paths, atomic writes, digests, JSON and safetensors; no pickle anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimkit.core import check, traffic
from slimkit.core.errors import AbsolutePathError, FileFormatError, LinkPathError
from slimkit.core.exchange import exchange

# Files of a folder that are looked at for one of a near name.
_MOST_NAMES = 1000

PathLike = str | os.PathLike[str]
Array = np.ndarray[Any, Any]

_COMMIT = ".slimkit-commit"  # new files of a folder on their way to their places
_REPLACES = ".slimkit-replaces"  # beside them: the old files go
_LINKS_AT_MOST = 512  # files kept by hard links; beyond, moving a few new ones is quicker


def as_path(path: Any, name: str) -> Path:
    """A str or PathLike as a Path; TypeError for another type, ValueError when empty."""
    check.instance(path, (str, os.PathLike), name, "a str or path")
    if not os.fspath(path):
        check.wrong_value(name, "a non-empty path", path)
    return Path(path)


def save_directory(path: Any, name: str = "directory", *, relative: bool = False) -> Path:
    """Check a folder to save to: no symbolic link, and absolute unless `relative` allows others.

    Args:
        path: the folder; it need not exist yet.
        name: the argument's name, for the message.
        relative: take a relative path too, as seen from where the process is now.

    Returns:
        The folder as an absolute Path, not created.

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
        check.wrong_value(name, "a path" if relative else "an absolute path", path)
    folder = as_path(path, name)
    if relative:
        folder = folder.absolute()
    if not folder.is_absolute():
        raise AbsolutePathError(f"{name} must be an absolute path. Received: {str(folder)!r}")
    if folder.is_symlink():
        raise LinkPathError(f"{name} must not be a symbolic link. Received: {str(folder)!r}")
    return folder


def readable_file(path: Any, name: str) -> Path:
    """Check a file that is about to be read: it exists, and is a regular file or a link of a Hugging Face cache.

    Args:
        path: the file. A replacing of its folder's files that a kill interrupted is ended first (`settle`).
        name: the argument's name, for the message.

    Returns:
        The path as it was given: its name, and with it its ending, is the file's and not its blob's.

    Raises:
        LinkPathError: a symbolic link that leads anywhere else than into its own cache's blobs.
        FileFormatError: there is no such file.
    """
    file = as_path(path, name)
    settle(file.parent)
    if file.is_symlink() and not is_hub_link(file):
        raise LinkPathError(f"{name} must not be a symbolic link. Received: {str(file)!r}")
    if not file.is_file():
        raise FileFormatError(f"{name} must be an existing file. Received: {str(file)!r}{meant(file)}")
    return file


def meant(path: Path) -> str:
    """'. Did you mean ...?' for the file or folder that a path which does not exist stands for, or the empty string."""
    beside = path.parent
    names = [entry.name for entry in itertools.islice(beside.iterdir(), _MOST_NAMES)] if beside.is_dir() else []
    found = "" if path.exists() else check.nearest(path.name, names)
    return f". Did you mean {str(beside / found)!r}?" if found else ""


def is_hub_link(path: Path) -> bool:
    """Whether a link is one of those that a Hugging Face cache is made of, and ends in that cache's blobs.

    CACHE/models--NAME/snapshots/REVISION/[FOLDER/]FILE -> CACHE/models--NAME/blobs/DIGEST
    """
    if not path.is_symlink():
        return False
    target, place = path.resolve(), path.parent.resolve() / path.name
    # The whole way is resolved: a blob that leads on elsewhere, or a blobs folder that is a link itself, is refused.
    return any(p.name == "snapshots" and target.parent == p.parent / "blobs" for p in place.parents)


def inside(folder: PathLike, relative: str, name: str) -> Path:
    """Join a file name that came from data to its folder; refuse one that leads outside, save by a cache's own link."""
    base = Path(folder).resolve()
    joined = base / check.text(relative, name)
    place = joined.parent.resolve() / joined.name
    target = place if base in place.parents and is_hub_link(place) else joined.resolve()
    if base != target and base not in target.parents:
        check.wrong_value(name, f"a path inside {str(folder)!r}", relative)
    return target


@contextlib.contextmanager
def atomic_file(
    path: PathLike, mode: str = "wb", *, before: Callable[[Path], object] | None = None
) -> Iterator[IO[Any]]:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; missing parent folders are made.
        mode: "wb" or "w" (UTF-8).
        before: called with the new file when it is on the disk, just before it takes the old one's place.

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
        # The same bytes on every system: no line end becomes another one.
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with os.fdopen(descriptor, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            traffic.wrote(os.fstat(handle.fileno()).st_size)
        os.chmod(temporary, 0o666 & ~_umask())
        if before is not None:
            before(Path(temporary))
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
        LinkPathError: `target` is a symbolic link; nothing was moved.
    """
    if Path(target).is_symlink():
        raise LinkPathError(f"refusing to write through the symbolic link {str(target)!r}")
    with open(source, "rb+") as handle:
        os.fsync(handle.fileno())
    os.chmod(source, 0o666 & ~_umask())
    os.replace(source, target)
    _sync_folder(Path(target).parent)


def link_or_copy(source: PathLike, target: PathLike) -> None:
    """Give a file a second name; where the file system has no hard links, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def atomic_directory(path: PathLike, *, keep: bool = False) -> Iterator[Path]:
    """Fill a folder so that it appears whole or not at all; one of that name is replaced by a single rename.

    The old and the new folder change places by one system call. Where that cannot be (a mount point, the folder this
    process works in, a file system without the call, more than a few hundred files to keep), a single rename makes
    FOLDER/.slimkit-commit of the new files, which then move out of it one by one. `readable_file` ends such a move
    after a kill (`settle`), so that everything of slimkit reads the new files.

    Args:
        path: the folder.
        keep: files in the old folder that the new one does not bring stay; otherwise they go.

    Yields:
        A temporary folder on the same disk to write into.

    Raises:
        LinkPathError: `path` is a symbolic link.
        OSError: the disk is full or the parent cannot be written.
    """
    target = Path(path)
    if target.is_symlink():
        raise LinkPathError(f"refusing to replace the symbolic link {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    exists = target.exists()
    # A folder may be writable where the one above it is not.
    place = target if exists and not os.access(target.parent, os.W_OK) else target.parent
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=place))
    try:
        yield temporary
        if keep and (linked := [e.name for e in temporary.iterdir() if (target / e.name).is_symlink()]):
            raise LinkPathError(f"refusing to replace the symbolic link {str(target / linked[0])!r}")
        if not exists:
            os.chmod(temporary, 0o777 & ~_umask())
            os.replace(temporary, target)
        elif place == target or _works_in(target) or not _swapped(temporary, target, keep):
            commit(temporary, target) if keep else replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _works_in(folder: Path) -> bool:
    """Whether the process works in a folder, which must then not move away under it."""
    here, there = Path.cwd(), folder.resolve()
    return here == there or there in here.parents


def _swapped(temporary: Path, target: Path, keep: bool) -> bool:
    """Let the new folder and the old one change places; False, with the old one as it was, where that cannot be."""
    links = _linked(target, temporary) if keep else []
    if links is None:
        return False
    shutil.copymode(target, temporary)
    if not exchange(temporary, target):
        _remove(links)
        return False
    for entry in temporary.iterdir() if keep else ():  # what another process wrote there in the meantime
        if not os.path.lexists(target / entry.name):
            os.replace(entry, target / entry.name)
    shutil.rmtree(temporary, ignore_errors=True)
    return True


def _linked(source: Path, target: Path) -> list[Path] | None:
    """Hard links in a new folder to all that only the old one holds; None where there is too much, or no such link."""
    found = [entry for entry, _ in zip(source.rglob("*"), range(_LINKS_AT_MOST + 1))]
    made: list[Path] = []
    try:
        for entry in sorted(found) if len(found) <= _LINKS_AT_MOST else ():  # a folder comes before what is in it
            place = target / entry.relative_to(source)
            if os.path.lexists(place):
                continue
            if entry.is_dir() and not entry.is_symlink():
                place.mkdir()
                shutil.copymode(entry, place)
            else:
                os.link(entry, place, follow_symlinks=False)
            made.append(place)
    except OSError:
        _remove(made)
        return None
    return made if len(found) <= _LINKS_AT_MOST else None


def _remove(entries: Sequence[Path]) -> None:
    for entry in sorted(entries, reverse=True):  # what is in a folder comes before it
        with contextlib.suppress(OSError):
            entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def commit(finished: Path, target: Path) -> None:
    """Move new files into a folder that keeps what else it holds: one rename decides, and `settle` does the rest.

    Args:
        finished: a folder of whole files, on the same disk; it is gone afterwards.
        target: the folder, which exists.
    """
    os.replace(finished, target / _COMMIT)
    settle(target)


def replace(finished: Path, target: Path) -> None:
    """Let new files take the place of all that a folder holds: as `commit`, but nothing of the old stays."""
    (finished / _REPLACES).touch()
    commit(finished, target)


def settle(folder: PathLike) -> None:
    """End the replacing of a folder's files that a kill interrupted, in place; nothing where there is none.

    Args:
        folder: any folder that is about to be read; it need not exist.

    Raises:
        FileFormatError: there is one, and this process may not write here.
    """
    target = Path(folder)
    staged = target / _COMMIT
    if not staged.is_dir() or staged.is_symlink():
        return
    try:
        if (staged / _REPLACES).exists():
            for entry in target.iterdir():
                if entry.name not in (_COMMIT, ".lock"):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            (staged / _REPLACES).unlink()
        # A folder without its JSON files is no model yet, for readers that know nothing of this.
        for entry in sorted(staged.iterdir(), key=lambda e: (e.suffix == ".json", e.name)):
            place = target / entry.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            os.replace(entry, place)
        staged.rmdir()
    except PermissionError as error:
        raise FileFormatError(
            f"{target}: a kill kept new files from their places ({_COMMIT}), and they cannot be moved: {error}"
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; some file systems refuse to sync a folder, and lose nothing by it.
    with contextlib.suppress(OSError):  # Windows opens no folder at all
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finite(value: Any) -> Any:
    """A nested value for a report, with None for NaN and infinity, which JSON has no words for.

    Example:
        >>> finite({"loss": [0.5, float("nan")]})
        {'loss': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        traffic.read(file, file.stat().st_size)
        with safe_open(str(file), framework="np") as handle:
            return {k: handle.get_tensor(k) for k in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from None


def digest_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        traffic.read(path, os.fstat(handle.fileno()).st_size)
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
