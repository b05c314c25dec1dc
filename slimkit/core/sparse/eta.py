"""How much of a long run is left: learned from the layers that are done, which those of the next blocks resemble."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimkit.core.sparse.layer import Layer


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a layer.

    Args:
        layer: the layer that was just finished.
        done: layers finished, those of an earlier run included.
        total: layers there are.
        seconds: since the run began, in this process.
        seconds_left: estimate for the layers that are left.
    """

    layer: str
    done: int
    total: int
    seconds: float
    seconds_left: float


class Estimate:
    """Seconds left, from the seconds that the last layer of the same place in its block took.

    A layer whose place was not seen yet is solved at the rate per product of those that were, and waits for its
    inputs as long as they did on average: a layer that shares its inputs with the one before waits for nothing.

    Args:
        layers: every layer of the run, in any order.
        clock: seconds, rising.

    Example:
        >>> layers = {f"block.{i}.up": Layer(f"block.{i}.up", "linear", (8, 4)) for i in range(3)}
        >>> now = iter([0.0, 2.0])
        >>> Estimate(layers, lambda: next(now)).finished("block.0.up").seconds_left
        4.0
    """

    def __init__(self, layers: Mapping[str, Layer], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._last = clock()
        # Factoring a Hessian, and going over the weights.
        self._left = {n: layer.groups * layer.n_in**3 + layer.size * layer.n_in for n, layer in layers.items()}
        self._total = len(layers)
        # Place in a block -> products, seconds of solving and of waiting of the last such layer.
        self._took: dict[str, tuple[int, float, float]] = {}

    def start(self) -> None:
        """Begin the first layer: what came before, such as capturing the inputs of the blocks, does not come again."""
        if not self._took:
            self._last = self._clock()

    def skip(self, name: str) -> None:
        """Count a layer that an earlier run finished."""
        self._left.pop(name, None)
        self._last = self._clock()

    def finished(self, name: str, solving: float = 0.0) -> Progress:
        """Count a layer whose work ends now, and of whose seconds so many went into solving it."""
        now = self._clock()
        self._took[_place(name)] = self._left.pop(name, 0), solving, max(0.0, now - self._last - solving)
        self._last = now
        products, solved, waited = (sum(values) for values in zip(*self._took.values()))
        rate, wait = solved / max(products, 1), waited / len(self._took)
        left = 0.0
        for other, work in self._left.items():
            _, own, own_wait = self._took.get(_place(other), (0, rate * work, wait))
            left += own + own_wait
        return Progress(name, self._total - len(self._left), self._total, now - self._began, left)


def _place(name: str) -> str:
    """A layer's name without the block's number."""
    return re.sub(r"\.[0-9]+\.", ".#.", name, count=1)
