"""Ctrl-C and SIGTERM as exceptions: a scheduler's stop ends a command as tidily as a person's."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# What asks a command to stop: a person's Ctrl-C, and the scheduler's or container's wish.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: no error, and nothing that catches errors should hold it up."""


def stopped_by(number: int) -> BaseException:
    """The exception that a signal becomes."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` while the context is open, so that files are cleaned up as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: Any) -> None:
        raise stopped_by(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
