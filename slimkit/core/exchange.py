"""Two folders change places by one system call, where the system has such a call."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
# The call is missing, the file system lacks it, or one of the two is a mount point or may not be moved.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES)


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change places, so that at every moment each name leads to one of the two.

    Args:
        one: a file or folder.
        other: another on the same file system.

    Returns:
        False, with nothing changed, where the system or the file system cannot.

    Raises:
        OSError: one of them does not exist.

    Source:
        rename(2) of Linux 3.15 (RENAME_EXCHANGE); renamex_np(2) of macOS 10.12 (RENAME_SWAP).
    """
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.4
        arguments = (_AT_FDCWD, first, _AT_FDCWD, second, _SWAP)
    elif sys.platform == "darwin":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renamex_np", None)
        arguments = (first, second, _SWAP)  # type: ignore[assignment]
    else:
        return False
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
