"""A command that torchrun began several times over: which of them this one is, and which of them speaks."""

from __future__ import annotations

import os


def rank() -> int:
    """The number of this process among those of its command, from 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes do this command together; 1 where nobody began others.

    Example:
        >>> size() >= 1
        True
    """
    return max(1, int(os.environ.get("WORLD_SIZE", "1") or "1"))
