"""A command that torchrun began several times over: which of them this one is, and which of them speaks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimkit.core.errors import ConfigError


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


def share_of(samples: int, option: str) -> int:
    """How many samples of an update this process reads: together they read as many as one process would.

    Args:
        samples: of an update.
        option: how the user gave them.

    Raises:
        ConfigError: they cannot be shared out evenly.

    Example:
        >>> share_of(16, "--batch-size")
        16
    """
    if samples % size():
        raise ConfigError(f"{option} must be a multiple of the {size()} processes. Received: {samples}")
    return samples // size()


@contextlib.contextmanager
def result(out: Path) -> Iterator[Path]:
    """A folder to write a result into: it appears whole, of the first process; those of the others are thrown away."""
    from slimkit.core import files

    with files.atomic_directory(out) if rank() == 0 else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class CrewFramework(Protocol):
    """What a command asks of a framework that lets several processes do it; by itself one process does."""

    def join(self) -> None:
        """Join the other processes of the command, where it was begun several times over.

        Raises:
            ConfigError: this framework's commands run in one process.
        """
        if size() > 1:
            raise ConfigError(
                f"this command was begun by {size()} processes, and in this framework one does it: leave torchrun out"
            )

    def once(self, work: Callable[[], Any]) -> Any:
        """What the first process does alone; all get its result, a plain value, or its error."""
        return work()

    def each(self, value: Any) -> list[Any]:
        """A plain value of every process, by its number."""
        return [value]

    def agree(self, what: str, batches: Sequence[Any]) -> None:
        """Refuse batches that are not the same in every process; all of them call.

        Args:
            what: how a message calls them.
            batches: tensors and plain values, nested as they are.
        """
        return

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """What every process does for itself, the first before the others, who may find what it wrote."""
        made: list[Any] = []
        self.once(lambda: made.append(work()))
        return made[0] if made else work()

    def share(self, opened: Any) -> None:
        """Let each process hold a part of an `Opened` model from here on, in place."""
        return

    def gather(self, opened: Any) -> None:
        """Put a shared model together again in the first process, in place; all of them call, the others lose it."""
        return
