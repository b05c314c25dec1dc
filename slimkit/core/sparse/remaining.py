"""How much of a long run is left: learned from the layers that are done, and before that from what layers cost."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.methods import METHODS


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


class _Latest:
    """Seconds by key, as of late; the first of all also loads libraries, and is forgotten for any other."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, float]] = {}
        self._first: str | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not self._latest

    def put(self, key: str, seconds: float, work: float) -> None:
        """So much work took so many seconds."""
        if not self._latest:
            self._first = key
        elif self._first is not None:
            del self._latest[self._first]
            self._first = None
        self._latest[key] = _blend(self._latest[key][0] if key in self._latest else None, seconds), work

    def of(self, key: str, work: float) -> float:
        """The seconds of a key; at the rate of the others where it was not seen."""
        if key in self._latest:
            return self._latest[key][0]
        seconds, known = (sum(values) for values in zip(*self._latest.values())) if self._latest else (0.0, 0.0)
        return seconds * work / known if known else 0.0


def _blend(before: float | None, now: float) -> float:
    # A single block may meet a busy machine; three in a row show that it became busy.
    return now if before is None else (before + 2 * now) / 3


class Estimate:
    """Seconds left of a walk over some layers.

    It waits for a layer's inputs, solves it, and between two parts of the model sends all data through the part.
    What was measured at the same place of an earlier block, or at the same shape, stands for itself. Before that, the
    forward that found the order of the layers gives the waiting by when it reached each of them, and the table of
    methods how long solving takes beside what was solved already.

    Args:
        layers: every layer of the run, in any order.
        method: how they are solved.
        models: models that data is sent through: 2 where there is a dense one beside the sparse one.
        clock: seconds, rising.

    Example:
        >>> layers = {f"block.{i}.up": SparseLayer(f"block.{i}.up", "linear", (8, 4)) for i in range(3)}
        >>> now = iter([0.0, 2.0])
        >>> Estimate(layers, "magnitude", clock=lambda: next(now)).finished("block.0.up").seconds_left
        4.0
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        method: str,
        models: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._models, self._clock = models, clock
        self._layers = {name: (layer, _shape(layer)) for name, layer in layers.items()}
        self._work = {_shape(layer): METHODS[method].seconds(layer) for layer in layers.values()}
        self._began = self._last = clock()
        self._total, self._done = len(layers), 0
        self._left = set(self._layers)
        self._shapes = Counter(shape for _, shape in self._layers.values())  # how many layers of each shape are left
        self._solving, self._adding = _Latest(), _Latest()
        self._solved = self._worked = 0.0
        self._added: list[float] = []  # seconds of each sum of this pass
        self._foretold: dict[str, float] = {}  # pass -> seconds of its forwards by the first one
        self._forward: dict[str, float] = {}  # pass -> seconds of its forwards as they were
        self._sums: dict[str, float] = {}  # pass -> products of its sums, for one row
        self._part: frozenset[str] = frozenset()
        self._whole = False  # this part holds several blocks, each of which waits longer than the one before
        self._passes: set[str] = set()  # the first layers of those passes of this part that are to come
        self._after: Counter[str] = Counter()  # passes of the parts that are to come
        self._n_parts = self._n_after = 0
        self._opening = self._closing = 0.0  # seconds before a part is ready, and of sending all data through it
        self._known_opening = self._known_closing = False

    def skip(self, name: str) -> None:
        """Count a layer that an earlier run finished."""
        self._count(name)
        self._last = self._clock()

    def opened(
        self,
        names: Iterable[str],
        passes: Sequence[Sequence[Sequence[str]]],
        reached: Mapping[str, float],
        preparing: float = 0.0,
    ) -> None:
        """A part of the model is ready.

        Args:
            names: its layers, as far as known.
            passes: for each sending of the data through it the feeds it is for.
            reached: layer -> seconds of one model's forward over all batches until its call, as far as known.
            preparing: how many of the seconds before come again with every part.
        """
        now = self._clock()
        if self._n_parts:  # what comes before the first part, such as reading the embeddings, does not come again
            took = now - self._last
            self._opening = _blend(self._opening if self._known_opening else None, took)
            self._known_opening = True
        self._last, self._n_parts = now, self._n_parts + 1
        self._part = frozenset(names).union(n for feeds in passes for feed in feeds for n in feed)
        self._passes = {feeds[0][0] for feeds in passes}
        self._whole = len({_block(n) for n in self._part}) > 1
        start = _start(self._part, reached)
        for feeds in passes:
            key = self._key(feeds[0][0])
            until = max(reached.get(n, start) for feed in feeds for n in feed)
            self._foretold[key] = self._models * (until - start)
            inputs = [self._layers[feed[0]][0] for feed in feeds]
            self._sums[key] = sum(float(layer.groups * layer.n_in**2) for layer in inputs)
        outside = self._left - self._part
        self._after = Counter(key for key in map(self._key, outside) if key in self._foretold)
        self._n_after = len({_block(n) for n in outside})
        whole = max((reached[n] - start for n in self._part if n in reached), default=0.0)
        if not self._known_opening:
            self._opening = preparing + (whole if self._part >= reached.keys() else 0.0)
        if not self._known_closing:
            self._closing = self._models * whole

    def added(self, seconds: float) -> None:
        """So many seconds of the waiting went into sums over rows."""
        self._added.append(seconds)

    def replayed(self, first: str) -> None:
        """All data has been sent through for the pass that begins with this layer."""
        now, key = self._clock(), self._key(first)
        self._passes.discard(first)
        summed = sum(self._added)
        self._forward[key] = _blend(self._forward.get(key), max(0.0, now - self._last - summed))
        if self._adding.empty and len(self._added) > 1:  # the first one of all loads libraries, too
            summed = (summed - self._added[0]) * len(self._added) / (len(self._added) - 1)
        self._adding.put(key, summed, self._sums[key])
        self._last, self._added = now, []

    def finished(self, name: str, solving: float = 0.0) -> Progress:
        """Count a layer whose work ends now, and of whose seconds so many went into solving it."""
        now = self._clock()
        took = now - self._last
        shape = self._layers[name][1]
        self._solving.put(shape, solving or took, self._work[shape])
        self._solved, self._worked, self._last = self._solved + (solving or took), self._worked + took, now
        self._count(name)
        return Progress(name, self._done, self._total, now - self._began, self._seconds_left())

    def closed(self) -> None:
        """All data has been sent through the part as it is now."""
        now = self._clock()
        self._closing = _blend(self._closing if self._known_closing else None, now - self._last)
        self._known_closing, self._last = True, now

    def _seconds_left(self) -> float:
        # Several processes solve at once; and what is solved is stored, too.
        left = sum(n * self._solving.of(shape, self._work[shape]) for shape, n in self._shapes.items())
        left *= self._worked / self._solved if self._solved else 1.0
        times, more = self._unlike_foretold()
        for key, n in (self._after + Counter(map(self._key, self._passes))).items():
            left += n * self._forward.get(key, max(0.0, self._foretold[key] * times + more))
            left += n * self._adding.of(key, self._sums[key])
        left += self._n_after * (self._opening + self._closing)
        return left + (self._closing if self._n_after or self._n_parts > 1 else 0.0)

    def _unlike_foretold(self) -> tuple[float, float]:
        """What to multiply the foretold seconds of a pass with, and what to add, by the passes that were seen."""
        if not self._forward:
            return 1.0, 0.0
        took, foretold = sum(self._forward.values()), sum(self._foretold[key] for key in self._forward)
        if self._whole and foretold:
            return took / foretold, 0.0
        return 1.0, (took - foretold) / len(self._forward)  # such as reading what enters a block from files

    def _count(self, name: str) -> None:
        self._done += 1
        if name in self._left:
            self._left.remove(name)
            self._shapes[self._layers[name][1]] -= 1

    def _key(self, first: str) -> str:
        """What a pass has in common with those of other parts that are like it: the place of its first layer."""
        return first if self._whole else _place(first)


def _start(part: Collection[str], reached: Mapping[str, float]) -> float:
    """Seconds of a forward until it comes to a part of the model."""
    first = min((n for n in part if n in reached), key=lambda n: reached[n], default=None)
    if first is None:
        return 0.0
    before = [s for n, s in reached.items() if n not in part and s < reached[first]]
    if before:
        return max(before)
    # What comes before the first block, such as embeddings, takes what the other blocks need to reach the same layer.
    gaps = []
    for other, seconds in reached.items():
        if other not in part and _place(other) == _place(first):
            gaps.append(seconds - max((s for s in reached.values() if s < seconds), default=0.0))
    return reached[first] - min(gaps) if gaps else 0.0


def _shape(layer: SparseLayer) -> str:
    return f"{layer.groups} {layer.n_out} {layer.n_in}"


def _place(name: str) -> str:
    """A layer's name without the block's number."""
    return re.sub(r"(^|\.)[0-9]+\.", r"\1#.", name, count=1)


def _block(name: str) -> str:
    """A layer's name up to the block's number; empty for a layer outside blocks."""
    found = re.match(r"(|.*?\.)[0-9]+\.", name)
    return found.group() if found else ""
