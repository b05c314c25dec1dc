"""How long each stage of a pruning took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Seconds:
    """Wall-clock seconds by stage; a stage inside another one counts for itself alone.

    Args:
        clock: seconds, rising.

    Example:
        >>> ticks = iter([0.0, 1.0, 3.0, 7.0])
        >>> seconds = Seconds(ticks.__next__)
        >>> with seconds.stage("plan"), seconds.stage("score"):
        ...     pass
        >>> seconds.spent
        {'plan': 5.0, 'score': 2.0}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = {}
        self._clock = clock
        self._inside: list[float] = []  # of each open stage, what those inside it took

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the context closes."""
        self.spent.setdefault(name, 0.0)
        self._inside.append(0.0)
        began = self._clock()
        try:
            yield
        finally:
            took = self._clock() - began
            self.spent[name] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took

    def begin(self, *kept: str) -> None:
        """Forget all stages but some: another plan is made."""
        self.spent = {name: took for name, took in self.spent.items() if name in kept}
