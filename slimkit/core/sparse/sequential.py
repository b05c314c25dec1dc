"""One walk over a model: calibrate its layers in order, solve each, put it in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from slimkit.core.log import progress
from slimkit.core.sparse import processes
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import CalibratedBlock, SparseFramework
from slimkit.core.sparse.maths.backend import Array
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.solve import Solved, solve
from slimkit.core.sparse.ordered import OrderedSums
from slimkit.core.sparse.reconstruct import reconstruct
from slimkit.core.sparse.remaining import Estimate, Progress
from slimkit.core.sparse.totals import counts


class SequentialPass:
    """One pass over a model with one ratio for every layer, or a ratio for each.

    Args:
        host: the model.
        config: what to do.
        layers: the layers by name, those that are to change and maybe others.
        names: the layers that are to change, in the model's order.
        ratios: layer -> ratio; None gives every layer the configuration's.
        on_progress: called after every layer; None shows a bar on a terminal and log lines elsewhere.
        on_layer: called after every layer besides, with its row of the report.

    Attributes:
        solved: layer -> its row of the report, as far as the walk has come.
        masks: layer -> boolean array, True where the weight stays; empty when the host keeps none.
    """

    def __init__(
        self,
        host: SparseFramework,
        config: SparseConfig,
        layers: Mapping[str, SparseLayer],
        names: Sequence[str],
        ratios: Mapping[str, float] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_layer: Callable[[Progress, dict[str, Any]], None] | None = None,
    ) -> None:
        self.solved: dict[str, dict[str, Any]] = {}
        self.masks: dict[str, Array] = {}
        self._host, self._config, self._layers, self._names = host, config, layers, names
        sizes = {n: layers[n].size for n in names}
        self._counts = counts(sizes, ratios or dict.fromkeys(names, config.sparse_ratio))
        self._estimate = Estimate({n: layers[n] for n in names}, config.method, 2 if config.paired else 1)
        self._on_progress, self._on_layer = on_progress, on_layer
        self._bar = iter(progress(list(names), "layers")) if on_progress is None else iter(())

    def run(self, dataset: Any) -> None:
        """Walk over the whole model, in place."""
        if not self._config.row.needs_data and self._host.keeps_masks:
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
        if self._on_layer is not None:
            self._on_layer(step, self.solved[name])
        if self._on_progress is not None:
            self._on_progress(step)

    def _stages(self, dataset: Any) -> Iterator[tuple[CalibratedBlock, list[tuple[str, ...]]]]:
        """The parts of the model that are left to do, with the layers to calibrate at once."""
        for stage in self._host.stages(dataset, self._names, self._config.paired, self._config.residual):
            if stage.rows is not None:  # an earlier run did it
                self.solved.update(stage.rows)
                for name in stage.rows:
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
            self._estimate.opened(stage.names, passes, stage.reached, time.perf_counter() - start)
            for feeds in passes:
                yield stage, feeds
            for name in stage.names:
                if name not in self.solved:  # its block leaves memory now, reached or not
                    self._settle(name, Moments(self._layers[name]) if self._config.needs_data else None)
            if self._config.row.reconstructs and stage.feeds:
                self._reconstruct(stage)
            stage.advance()
            self._estimate.closed()

    def _reconstruct(self, stage: CalibratedBlock) -> None:
        settings = self._config.settings
        block = stage.trained(float(settings.get("inherited", 1.0)))
        if block is not None:
            facts = reconstruct(self._host, block, settings)
            for name in (n for feed in stage.feeds for n in feed):
                self.solved[name].update(facts)

    def _moments(self, feed: tuple[str, ...]) -> Moments:
        layer, paired = self._layers[feed[0]], self._config.paired
        alone = paired and len(feed) == 1 and layer.n_out <= layer.n_in
        return Moments(layer, paired, self._host.weight(feed[0]) if alone else None, self._host.deals)

    def _calibrate(self, stage: CalibratedBlock, feeds: Sequence[tuple[str, ...]]) -> None:
        moments = {feed[0]: self._moments(feed) for feed in feeds}
        ordered = OrderedSums(self._host, moments) if self._host.deals else None

        def add(name: str, *inputs: Array) -> None:
            start = time.perf_counter()
            (moments[name].add if ordered is None else partial(ordered.add, name))(*inputs)
            self._estimate.added(time.perf_counter() - start)

        stage.replay(list(moments), add, ordered.ended if ordered is not None else None)
        together = [self._layers[name] for feed in feeds for name in feed]
        owner = processes.owners(together, self._config.method, self._host.processes())
        if ordered is not None:
            every = range(self._host.processes())
            ordered.close({feed[0]: {owner[n] for n in feed} if owner else every for feed in feeds})
        self._estimate.replayed(feeds[0][0])
        for name, sums in moments.items() if ordered is None else ():
            processes.add_up(self._host, sums, self._host.weight(name))
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


def steps(
    feeds: Sequence[tuple[str, ...]], layers: Mapping[str, SparseLayer], matrices: int = 1
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
        >>> layers = {n: SparseLayer(n, "linear", (8, 4), family=n[0]) for n in ("a0", "b0", "a1", "b1")}
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
