"""Main memory given back to the system as soon as a matrix is freed, while a model larger than it is walked."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

# mallopt's name for the size from which an allocation is a mapping of its own.
M_MMAP_THRESHOLD = -3
# Of a block's largest matrix: what is smaller, such as most activations, is kept for reuse within the block. To give it
# back and take it anew, call by call, cost a tenth of a walk.
SHARE = 0.75
# What is smaller than this is always kept.
LEAST_BYTES = 1 << 20
# The largest size that glibc would come to by itself, once as large a block had been freed (64-bit).
USUAL_BYTES = 32 << 20


@contextlib.contextmanager
def returned_at_once(largest_bytes: int) -> Iterator[None]:
    """Let freed matrices leave the process at once; glibc would keep those up to 32 MiB, scattered over its heap.

    Does nothing where the C library is another. Afterwards glibc keeps blocks up to 32 MiB again.

    Args:
        largest_bytes: of the largest matrix in a block; what is much smaller is kept until `trim`.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, min(USUAL_BYTES, max(LEAST_BYTES, int(SHARE * largest_bytes))))
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, USUAL_BYTES)


def trim() -> None:
    """Give back what lies free between the blocks in use."""
    found = _of_libc("malloc_trim")
    if found is not None:
        found(0)


def _of_libc(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
