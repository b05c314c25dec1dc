"""How far a walk over layers is: a bar with the time left on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from slimkit.core.log import logger
from slimkit.core.sparse.remaining import Progress


class LayerBar:
    """Shows each `Progress` it is called with; a context, whose end takes the bar off the screen.

    Args:
        every_s: seconds between two log lines.
        clock: seconds, rising.

    Example:
        >>> with LayerBar() as bar:
        ...     bar(Progress("block.0.up", 1, 4, 2.0, 6.0))
    """

    def __init__(self, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._last = clock()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> LayerBar:
        # A quiet logger means a quiet terminal, as everywhere.
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("layers", total=None, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: Progress) -> None:
        """Show where the walk stands."""
        left = f"about {duration(step.seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, total=step.total, completed=step.done, left=f"{left}  {step.layer}")
            return
        now = self._clock()
        if now - self._last >= self._every_s:
            self._last = now
            logger.info("layers: %d of %d, %s", step.done, step.total, left)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> duration(8), duration(135), duration(7500)
        ('8 s', '2 min 15 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
