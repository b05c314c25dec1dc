"""What a few forwards teach of a model: in which order its layers are called, and which of them share one input."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

# A disturbance that arrives changed by less than this share of itself was only added to something.
TOLERANCE = 0.02


class CallOrder:
    """A record of calls, batch by batch.

    Args:
        alone: layers that share their input with no other, such as convolutions: each unfolds it in its own way.
        clock: seconds, rising.

    Attributes:
        feeds: layers in the order of their first call; those that always share one input together.
        repeated: layers that some batch calls more than once.
        reached: layer -> seconds of all batches' forwards until they call it.
        tokens: whether any batch held a token that is no padding.

    Example:
        >>> calls, x = CallOrder(), [[1.0], [2.0]]
        >>> calls.batch()
        >>> for name, value in (("q", x[0]), ("k", x[0]), ("up", x[1])):
        ...     calls.note(name, value)
        >>> calls.feeds
        [('q', 'k'), ('up',)]
        >>> calls.following(["q", "k"], ["q", "k", "up"])
        'up'
    """

    def __init__(self, alone: Collection[str] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.repeated: set[str] = set()
        self.tokens = False
        self._alone, self._clock = alone, clock
        self._began = 0.0
        self._seconds: list[dict[str, float]] = []  # for each batch, when each layer was called
        self._steps: dict[str, list[str]] = {}
        self._order: list[dict[str, int]] = []  # for each batch, when each layer was called
        self._alive: list[Any] = []  # inputs of this batch, kept so that an id stands for one
        self._first: dict[tuple[int, Any], str] = {}

    def batch(self, padding: bool = False) -> None:
        """Begin a batch, which may be nothing but padding."""
        self.tokens = self.tokens or not padding
        self._order.append({})
        self._alive.clear()
        self._first.clear()
        self._seconds.append({})
        self._began = self._clock()

    def note(self, name: str, x: Any, state: Any = None) -> None:
        """A layer is called with an input.

        Args:
            name: the layer.
            x: its input.
            state: what tells the input's contents from later ones in the same memory.
        """
        order = self._order[-1]
        if name in order:
            self.repeated.add(name)
        order[name] = len(self._alive)
        self._seconds[-1][name] = self._clock() - self._began
        self._alive.append(x)
        first = self._first.setdefault((id(x), state), name)
        self._steps.setdefault(name, []).append(f"{len(self._order)}:{first}")

    @property
    def feeds(self) -> list[tuple[str, ...]]:
        """Layers in the order of their first call; those that always share one input together."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for name, steps in self._steps.items():
            shared.setdefault((name if name in self._alone else "", *steps), []).append(name)
        return [tuple(names) for names in shared.values()]

    @property
    def reached(self) -> dict[str, float]:
        """Layer -> seconds of all batches' forwards until they call it, for the last time.

        The first batch also warms libraries up, so where there are others it counts as much as they do on average.
        """
        found: dict[str, float] = {}
        for name in self._steps:
            calls = [batch[name] for batch in self._seconds if name in batch]
            steady = calls[1:] if len(calls) > 1 and name in self._seconds[0] else calls
            found[name] = sum(steady) * len(calls) / len(steady)
        return found

    def following(self, names: Sequence[str], among: Iterable[str]) -> str | None:
        """The first of `among` that every batch calls, and after all of `names`; None when there is none.

        A forward that only watches `names` may end there. What some batches leave out, such as an expert, says
        nothing of the order in others.
        """
        if self.repeated or any(all(n not in order for order in self._order) for n in names):
            return None
        latest = [max((order.get(n, -1) for n in names), default=-1) for order in self._order]
        for name in among:
            if name not in names and all(order.get(name, -1) > last for order, last in zip(self._order, latest)):
                return name
        return None
