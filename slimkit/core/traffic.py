"""The bytes that a walk over a folder of weights reads and writes, counted where files are read and written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from slimkit.core.log import logger


class Traffic:
    """Bytes read and written while a context is open, of tensors and of what lies beside them.

    Headers of files, and the samples that tell a file from another, are not counted.

    Args:
        source: the files of weights that are walked over.
    """

    def __init__(self, source: Iterable[Path]) -> None:
        self._size = {os.path.realpath(file): os.path.getsize(file) for file in set(source)}
        self._known: dict[str, bool] = {}  # name that a file was opened by -> whether it is of the source
        self._source, self._own, self._written = 0, 0, 0

    def note(self, name: str, n: int) -> None:
        """So many bytes of a file were read."""
        if name not in self._known:
            self._known[name] = os.path.realpath(name) in self._size
        if self._known[name]:
            self._source += n
        else:
            self._own += n

    def wrote(self, n: int) -> None:
        """So many bytes were written."""
        self._written += n

    def facts(self) -> dict[str, int]:
        """For a report: the "source"'s size, the bytes read of it and of other files, and those written."""
        size = sum(self._size.values())
        return {"source": size, "read_source": self._source, "read_own": self._own, "written": self._written}


_OPEN: ContextVar[tuple[Traffic, ...]] = ContextVar("traffic", default=())


@contextlib.contextmanager
def counted(source: Iterable[Path]) -> Iterator[Traffic]:
    """Count what this thread, and those that it hands its context to, read and write.

    Example:
        >>> import tempfile
        >>> from slimkit.core import files
        >>> place = Path(tempfile.mkdtemp(), "weights")
        >>> with files.atomic_file(place) as handle:
        ...     _ = handle.write(b"1234")
        >>> with counted([place]) as traffic:
        ...     _ = files.digest_file(place)
        >>> traffic.facts()
        {'source': 4, 'read_source': 4, 'read_own': 0, 'written': 0}
    """
    traffic = Traffic(source)
    token = _OPEN.set((*_OPEN.get(), traffic))
    try:
        yield traffic
    finally:
        _OPEN.reset(token)


def read(file: object, n: int) -> None:
    """So many bytes of a file were read, for whoever counts."""
    for traffic in _OPEN.get():
        traffic.note(str(file), n)


def wrote(n: int) -> None:
    """So many bytes were written, for whoever counts."""
    for traffic in _OPEN.get():
        traffic.wrote(n)


def added(every: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The facts of several processes that walked over one source."""
    parts = list(every)
    return {key: (max if key == "source" else sum)(part[key] for part in parts) for key in parts[0]}


def say(what: str, facts: Mapping[str, int]) -> None:
    """Log what a walk has read and written.

    Args:
        what: the call.
        facts: as `Traffic.facts`.
    """
    size = facts["source"]
    if not facts["written"]:  # it was finished before
        return
    logger.info(
        "%s read %s of weights that are %s (%.2f times), %s of its own files, and wrote %s",
        what,
        _megabytes(facts["read_source"]),
        _megabytes(size),
        facts["read_source"] / max(1, size),
        _megabytes(facts["read_own"]),
        _megabytes(facts["written"]),
    )


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
