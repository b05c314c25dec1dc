"""What slimkit says to a person while it works: the logger's level, and progress over long loops."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from slimkit.core import check

T = TypeVar("T")

logger = logging.getLogger("slimkit")

_LEVELS = {
    "notset": logging.NOTSET,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "critical": logging.CRITICAL,
}


def set_logger_level(level: str = "info") -> None:
    """Set the level of the "slimkit" logger, and show its lines on stderr if nothing shows them yet.

    Args:
        level: notset, debug, info, warn, warning, error, fatal or critical, in any letter case.

    Raises:
        ArgumentTypeError: `level` is not a str.
        ArgumentError: `level` is another word.

    Example:
        >>> set_logger_level("warning")
    """
    check.instance(level, str, "level", "a str")
    logger.setLevel(_LEVELS[check.choice(level.lower(), _LEVELS, "level")])
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate while showing how far a long loop is: a bar with ETA on a terminal, log lines elsewhere.

    Args:
        items: what to iterate over.
        what: a word for one item, for example "layers".
        total: their number, when `items` has no length.

    Yields:
        The items, unchanged.

    Example:
        >>> list(progress([1, 2], "layers"))
        [1, 2]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    # A quiet logger means a quiet terminal: the bar is shown where info lines would be.
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= 5 or (done == total and now - began >= 5):
            last = now
            left = f", about {(now - began) / done * (total - done):.0f} s left" if total else ""
            logger.info("%s: %d of %s%s", what, done, total if total else "?", left)
