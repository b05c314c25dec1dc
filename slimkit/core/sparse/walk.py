"""One walk over a model: calibrate its layers in order, solve each, put it in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from slimkit.core.log import progress
from slimkit.core.sparse import processes
from slimkit.core.sparse.allocate import counts
from slimkit.core.sparse.backend import Array
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.eta import Estimate, Progress
from slimkit.core.sparse.layer import Layer
from slimkit.core.sparse.moments import Moments
from slimkit.core.sparse.solve import Solved, solve

Seen = Callable[..., None]


class Stage(Protocol):
    """A part of the model through which calibration data can be sent again and again.

    Attributes:
        feeds: layers in the order they are called, the same in every process; those that share one input together.
        joined: where layers' outputs join the residual stream, as far as `join` has learned it.
        reached: layer -> seconds of a forward over all batches until its call, as far as one was watched.
    """

    feeds: list[tuple[str, ...]]
    joined: dict[str, str]
    reached: Mapping[str, float]

    def replay(self, names: Sequence[str], seen: Seen) -> None:
        """Send every batch through, calling ``seen(name, x, dense x, drift)`` at each call of the layers.

        Dense inputs and drifts (see Moments.add) may be None, or left out.
        """

    def join(self) -> None:
        """Learn where layers' outputs join the residual stream; UnsupportedError where that cannot be known."""

    def advance(self) -> None:
        """Take the outputs of the part as it is now as the inputs of the next."""


class Host(Protocol):
    """What the walk asks of a model in some framework.

    Attributes:
        keeps_masks: whether the whole model, and so all its masks, may be in memory at once.
    """

    keeps_masks: bool

    def not_finite(self) -> list[str]:
        """The parameters in memory that hold NaN or infinity."""

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Learn that a layer is done, and its row of the report."""

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, Layer], dict[str, str]]:
        """Every layer that can be sparse by name, and those that cannot with the reason; batches may help to tell."""

    def weight(self, name: str) -> Array:
        """The layer's weight as an array."""

    def store(self, name: str, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place, in the parameter's own dtype and device, and shift the bias."""

    def stages(self, dataset: Iterable[Any], names: Sequence[str], paired: bool) -> Iterator[Stage]:
        """The parts of the model, first to last."""

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember the weights and biases of the layers; the function returned puts them back."""

    def outputs(self, batch: Any) -> Any:
        """The model's first output for a batch, as a NumPy array without the rows of padding."""

    def processes(self) -> int:
        """How many processes share the calibration data."""

    def rank(self) -> int:
        """The number of this process, from 0."""

    def gather(self, value: Any) -> list[Any]:
        """A plain JSON value of every process, by its number."""

    def reduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Sums over all processes; exact where all but one give zeros."""


class Walk:
    """One pass over a model with one ratio for every layer, or a ratio for each.

    Args:
        host: the model.
        config: what to do.
        layers: the layers by name, those that are to change and maybe others.
        names: the layers that are to change, in the model's order.
        ratios: layer -> ratio; None gives every layer the configuration's.
        on_progress: called after every layer; None shows a bar on a terminal and log lines elsewhere.
        estimate: of the seconds left, where several walks share one.

    Attributes:
        solved: layer -> its row of the report, as far as the walk has come.
        masks: layer -> boolean array, True where the weight stays; empty when the host keeps none.
    """

    def __init__(
        self,
        host: Host,
        config: SparseConfig,
        layers: Mapping[str, Layer],
        names: Sequence[str],
        ratios: Mapping[str, float] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        self.solved: dict[str, dict[str, Any]] = {}
        self.masks: dict[str, Array] = {}
        self._host, self._config, self._layers, self._names = host, config, layers, names
        sizes = {n: layers[n].size for n in names}
        self._counts = counts(sizes, ratios or dict.fromkeys(names, config.sparse_ratio))
        self._estimate = estimate or estimate_of(config, layers, names)
        self._on_progress = on_progress
        self._bar = iter(progress(list(names), "layers")) if on_progress is None else iter(())

    def run(self, dataset: Any) -> None:
        """Walk over the whole model, in place."""
        if self._config.method == "magnitude" and self._host.keeps_masks:
            for name in self._names:
                self._settle(name, None)
        else:
            for stage, feeds in self._stages(dataset):
                self._calibrate(stage, feeds)
            for name in self._names:
                if name not in self.solved:  # no batch ever reached it: an expert nobody chose, a head never asked
                    self._settle(name, Moments(self._layers[name]))
        next(self._bar, None)

    def _settle(self, name: str, moments: Moments | None, last: bool = True) -> None:
        self._put(name, self._solve(name, moments, last))

    def _solve(self, name: str, moments: Moments | None, last: bool) -> Solved:
        start = time.perf_counter()
        ratio = self._counts[name] / self._layers[name].size
        result = solve(self._layers[name], self._host.weight(name), moments, ratio, self._config, last=last)
        result.account["seconds"] = round(time.perf_counter() - start, 4)
        return result

    def _put(self, name: str, result: Solved) -> None:
        self._host.store(name, result.weight, result.bias_shift)
        self.solved[name] = result.account
        if self._host.keeps_masks:
            # In the order of its shape, whatever the layer's layout: safetensors files take no other.
            self.masks[name] = result.keep.reshape(-1).reshape(result.keep.shape)
        self._host.settled(name, self.solved[name])
        next(self._bar, None)
        step = self._estimate.finished(name, self.solved[name]["seconds"])
        if self._on_progress is not None:
            self._on_progress(step)

    def _stages(self, dataset: Any) -> Iterator[tuple[Stage, list[tuple[str, ...]]]]:
        """The parts of the model that are left to do, with the layers to calibrate at once."""
        for stage in self._host.stages(dataset, self._names, self._config.paired):
            rows = getattr(stage, "rows", None)
            if rows is not None:  # an earlier run did it
                self.solved.update(rows)
                for name in rows:
                    self._estimate.skip(name)
                    next(self._bar, None)
                continue
            start = time.perf_counter()
            if self._config.residual:
                stage.join()
                stage.joined = self._host.gather(stage.joined)[0]
            passes = [list(stage.feeds)] if stage.feeds else []
            if self._config.sequential:
                passes = steps(stage.feeds, self._layers, 2 if self._config.paired else 1)
            names = getattr(stage, "names", ())
            self._estimate.opened(names, passes, stage.reached, time.perf_counter() - start)
            for feeds in passes:
                yield stage, feeds
            for name in names:
                if name not in self.solved:  # its block leaves memory now, reached or not
                    self._settle(name, Moments(self._layers[name]) if self._config.needs_data else None)
            stage.advance()
            self._estimate.closed()

    def _moments(self, feed: tuple[str, ...]) -> Moments:
        layer, paired = self._layers[feed[0]], self._config.paired
        alone = paired and len(feed) == 1 and layer.n_out <= layer.n_in
        return Moments(layer, paired, self._host.weight(feed[0]) if alone else None)

    def _calibrate(self, stage: Stage, feeds: Sequence[tuple[str, ...]]) -> None:
        moments = {feed[0]: self._moments(feed) for feed in feeds}

        def add(name: str, *inputs: Array) -> None:
            start = time.perf_counter()
            moments[name].add(*inputs)
            self._estimate.added(time.perf_counter() - start)

        stage.replay(list(moments), add)
        self._estimate.replayed(feeds[0][0])
        for name, sums in moments.items():
            processes.add_up(self._host, sums, self._host.weight(name))
        together = [self._layers[name] for feed in feeds for name in feed]
        owner = processes.owners(together, self._config.method, self._host.processes())
        mine: dict[str, Solved | Exception] = {}
        for feed in feeds:
            shared = moments.pop(feed[0])
            for name in feed:
                shared.layer = self._layers[name]
                if not owner:
                    self._settle(name, shared, name == feed[-1])
                elif owner[name] == self._host.rank():
                    try:
                        mine[name] = self._solve(name, shared, name == feed[-1])
                    except Exception as error:  # noqa: BLE001  (raised again once the others know)
                        mine[name] = error
        if owner:
            for name, result in processes.exchange(self._host, together, owner, mine):
                self._put(name, result)


def estimate_of(config: SparseConfig, layers: Mapping[str, Layer], names: Sequence[str], walks: int = 1) -> Estimate:
    """The estimate for walks over some layers that begin now."""
    return Estimate({n: layers[n] for n in names}, config.method, 2 if config.paired else 1, walks)


def steps(
    feeds: Sequence[tuple[str, ...]], layers: Mapping[str, Layer], matrices: int = 1
) -> list[list[tuple[str, ...]]]:
    """The feeds that are calibrated in one pass: siblings of a family together, every other feed alone.

    Siblings never feed each other, and a hundred experts would need a hundred passes. Their moments are in memory at
    once, so no more of them go together than take the room of the family's weights.

    Args:
        feeds: layers in the order they are called; those that share one input together.
        layers: the layers by name.
        matrices: second moments kept for each feed.

    Returns:
        The same feeds in groups, in the order of each group's first.

    Example:
        >>> layers = {n: Layer(n, "linear", (8, 4), family=n[0]) for n in ("a0", "b0", "a1", "b1")}
        >>> steps([("a0",), ("b0",), ("a1",), ("b1",)], layers)
        [[('a0',), ('a1',)], [('b0',), ('b1',)]]
    """
    room: dict[str, int] = {}
    for layer in layers.values():
        room[layer.family] = room.get(layer.family, 0) + layer.size
    found: list[list[tuple[str, ...]]] = []
    latest: dict[str, list[tuple[str, ...]]] = {}
    for feed in feeds:
        first = layers[feed[0]]
        group = latest.get(first.family) if first.family else None
        if group is not None and (len(group) + 1) * matrices * first.n_in**2 <= room[first.family]:
            group.append(feed)
        else:
            latest[first.family] = [feed]
            found.append(latest[first.family])
    return found
