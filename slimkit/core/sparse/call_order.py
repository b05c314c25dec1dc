"""What a few forwards teach of a model: in which order its layers are called, and which of them share one input."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

# A disturbance that arrives changed by less than this share of itself was only added to something.
TOLERANCE = 0.02


class CallOrder:
    """A record of calls, batch by batch.

    Args:
        alone: layers that share their input with no other, such as convolutions: each unfolds it in its own way.
        clock: seconds, rising.
        n_layers: how many layers there are; a batch may then end early where an alike one ran whole (see `note`).

    Attributes:
        feeds: layers in the order of their first call; those that always share one input together.
        repeated: layers that some batch calls more than once.
        reached: layer -> seconds of all batches' forwards until they call it.
        tokens: whether any batch held a token that is no padding.

    Example:
        >>> calls, x = CallOrder(), [[1.0], [2.0]]
        >>> calls.batch()
        >>> for name, value in (("q", x[0]), ("k", x[0]), ("up", x[1])):
        ...     _ = calls.note(name, value)
        >>> calls.feeds
        [('q', 'k'), ('up',)]
        >>> calls.following(["q", "k"], ["q", "k", "up"])
        'up'
    """

    def __init__(
        self, alone: Collection[str] = (), clock: Callable[[], float] = time.perf_counter, n_layers: int = 0
    ) -> None:
        self.repeated: set[str] = set()
        self.tokens = False
        self._alone, self._clock = alone, clock
        self._began = 0.0
        self._seconds: list[dict[str, float]] = []  # for each batch, when each layer was called
        self._steps: dict[str, list[str]] = {}
        self._order: list[dict[str, int]] = []  # for each batch, when each layer was called
        self._alive: list[Any] = []  # inputs of this batch, kept so that an id stands for one
        self._first: dict[tuple[int, Any], str] = {}
        self._n_layers, self._shape = n_layers, ""
        self._whole: set[str] = set()  # shapes of batches that ran whole and called every layer once

    def batch(self, padding: bool = False, shape: str = "") -> None:
        """Begin a batch.

        Args:
            padding: whether it is nothing but padding.
            shape: what it has in common with batches that run alike (`batch_shape`); "" for nothing.
        """
        self._shape = shape
        self.tokens = self.tokens or not padding
        self._order.append({})
        self._alive.clear()
        self._first.clear()
        self._seconds.append({})
        self._began = self._clock()

    def ran(self) -> None:
        """The batch ran whole."""
        if self._shape and not self.repeated and 0 < self._n_layers == len(self._order[-1]):
            self._whole.add(self._shape)

    def note(self, name: str, x: Any, state: Any = None) -> bool:
        """A layer is called with an input.

        Args:
            name: the layer.
            x: its input.
            state: what tells the input's contents from later ones in the same memory.

        Returns:
            Whether the batch may end here: every layer was called, as in a batch of the same shape that ran whole and
            called each once.
        """
        order = self._order[-1]
        if name in order:
            self.repeated.add(name)
        order[name] = len(self._alive)
        self._seconds[-1][name] = self._clock() - self._began
        self._alive.append(x)
        first = self._first.setdefault((id(x), state), name)
        self._steps.setdefault(name, []).append(f"{len(self._order)}:{first}")
        return self._shape in self._whole and len(order) == self._n_layers

    @property
    def feeds(self) -> list[tuple[str, ...]]:
        """Layers in the order of their first call; those that always share one input together."""
        return [tuple(names) for names in self._sharing(self._steps)]

    def feeds_by_batch(self) -> list[list[tuple[str, ...]]]:
        """The feeds as each batch alone shows them."""
        batches: list[dict[str, list[str]]] = [{} for _ in self._order]
        for name, steps in self._steps.items():
            for step in steps:
                batches[int(step.partition(":")[0]) - 1].setdefault(name, []).append(step)
        found: list[list[tuple[str, ...]]] = []
        for steps_of, order in zip(batches, self._order):
            groups = [sorted(names, key=order.__getitem__) for names in self._sharing(steps_of)]
            found.append([tuple(names) for names in sorted(groups, key=lambda names: order[names[0]])])
        return found

    def _sharing(self, steps: Mapping[str, Sequence[str]]) -> list[list[str]]:
        """Layers that have the same steps together."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for name, own in steps.items():
            shared.setdefault((name if name in self._alone else "", *own), []).append(name)
        return list(shared.values())

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

    def last(self, names: Sequence[str]) -> str | None:
        """The one of some layers that every batch calls last, where every batch calls each of them once; else None.

        A forward that only watches them may end at its call.
        """
        if self.repeated or not self._order or any(name not in order for order in self._order for name in names):
            return None
        found = {max(names, key=order.__getitem__) for order in self._order}
        return found.pop() if len(found) == 1 else None

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


def batch_shape(batch: Any) -> str:
    """What two batches have in common that run through a model alike: their structure, shapes and plain values.

    Example:
        >>> import numpy as np
        >>> batch_shape({"x": np.zeros((2, 3)), "deep": True})
        '{x:float64(2, 3),deep:True}'
    """
    if isinstance(batch, Mapping):
        return "{" + ",".join(f"{k}:{batch_shape(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ",".join(map(batch_shape, batch)) + ")"
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return f"{batch.dtype}{tuple(batch.shape)}"
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return repr(batch)
    return f"{type(batch).__name__} {id(batch)}"
