"""One run at a time in a folder: a lock that goes with its process, also when that is killed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from slimkit.core.errors import ConfigError


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
    file = folder / ".lock" if inside else folder.with_name(f".{folder.name}.lock")
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
