"""One job, one run at a time in a folder: a lock that goes with its process, and the record of what job it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import ConfigError, UnsupportedError

# Where a walk block by block keeps what it has finished, in the folder that it fills.
BLOCKS = ".slimkit-sparse"

# Where a folder written shard by shard keeps those that are whole, until all are.
SHARDS = ".slimkit-shards"


@contextlib.contextmanager
def locked(folder: Path, option: str, *, inside: bool = False) -> Iterator[None]:
    """Hold a folder for this process while the context is open.

    Args:
        folder: what to hold; it need not exist.
        option: what the user named it by, for messages.
        inside: the lock is FOLDER/.lock and stays there; otherwise it lies beside the folder, as .FOLDER.lock, and is
            taken away at the end.

    Raises:
        ConfigError: another process holds it, or the lock cannot be made.

    Example:
        >>> with locked(Path("/tmp/model"), "--out"):
        ...     pass
    """
    file = lock_file(folder, inside=inside)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = open(file, "a")  # noqa: SIM115  # held for the whole run
    except OSError as error:
        raise ConfigError(f"{option}: cannot use {folder}: {error.strerror or error}") from None
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows has no fcntl; two runs in one folder are then the user's care
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ConfigError(f"{option}: another run is using {folder}") from None
        # The holder before may have taken the file away between our opening and our locking of it.
        if not file.exists() or os.fstat(handle.fileno()).st_ino != file.stat().st_ino:
            raise ConfigError(f"{option}: another run is using {folder}")
        try:
            yield
        finally:
            if not inside:
                file.unlink(missing_ok=True)


def lock_file(folder: Path, *, inside: bool = False) -> Path:
    """The file that `locked` locks for a folder.

    Example:
        >>> lock_file(Path("/tmp/model")).name
        '.model.lock'
    """
    return folder / ".lock" if inside else folder.with_name(f".{folder.name}.lock")


def holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock file: {"pid": its process, or None where that is not known}; None where nobody does.

    Args:
        lock: the file that `locked` made.

    Example:
        >>> holder(Path("/no such folder/.lock")) is None
        True
    """
    try:
        import fcntl

        handle = open(lock)  # noqa: SIM115  # closed below
    except (ImportError, OSError):
        return None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return {"pid": _pid_of(os.fstat(handle.fileno()).st_ino)}
    return None


def _pid_of(inode: int) -> int | None:
    """The process that Linux's list of locks names for a file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                return int(words[4])
    return None


def same_job(state: Path, job: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Begin a job's state directory, or make sure that the one there is of the same job.

    Args:
        state: the directory.
        job: configuration and digests of everything that goes in, in what JSON can say.
        defaults: what options that came since the job was begun mean where nobody sets them, in the shape of `job`.

    Raises:
        UnsupportedError: it was begun with something else; the message names what differs.
    """
    file, job = state / "job.json", json.loads(json.dumps(dict(job)))  # as it comes back from the file
    if not file.exists():
        files.write_json(file, job)
        return
    found = filled(files.read_json(file), job, defaults or {})
    changed = [k for k in job if found.get(k) != job[k]] + [k for k in found if k not in job]
    if changed:
        raise UnsupportedError(
            f"{str(state.parent)!r} holds a run begun with another {', '.join(changed)}; resume with the same inputs, "
            "or remove it to start over, as --restart does where a command has it."
        )


def tidy(state: Path) -> None:
    """Take away what a finished run no longer needs; what says which job it was stays."""
    for leftover in state.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name not in ("job.json", ".lock"):
            leftover.unlink()


def filled(old: Any, new: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """What was kept of an earlier run, with the defaults of keys that it did not know: a key that came is no change.

    Args:
        old: as it was kept.
        new: the same of today.
        defaults: of today's keys, as far as they have one.

    Example:
        >>> filled({"plan": {"rate": 1}}, {"plan": {"rate": 1, "clip": 0}}, {"plan": {"rate": 3, "clip": 0}})
        {'plan': {'rate': 1, 'clip': 0}}
    """
    if not isinstance(old, dict):
        return old
    whole = dict(old)
    for key, value in new.items():
        if key not in old:
            if key in defaults:
                whole[key] = defaults[key]
        elif isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping):
            whole[key] = filled(old[key], value, defaults[key])
    return whole
