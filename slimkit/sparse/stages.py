"""Sending calibration data through a torch model, whole or block by block, while watching some layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.sparse.inputs import BlockInputs, Enough, as_input, enough, quiet, send, valid_tokens
from slimkit.sparse.residual import arriving, first_tensor, input_of, joints

import torch

Modules = Mapping[str, tuple[str, torch.nn.Module]]  # path -> (layer it belongs to, module)
Seen = Callable[[str, torch.Tensor, torch.Tensor | None, torch.Tensor | None], None]


@dataclass
class Trace:
    """What one forward of every batch teaches.

    Args:
        feeds: layers in the order of their first call; those that always share one input together.
        repeated: layers that some batch calls more than once.
        chained: whether each block's first input is the output of the block before, in every batch.
    """

    feeds: list[tuple[str, ...]] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    chained: bool = False


def trace(model: torch.nn.Module, dataset: Iterable[Any], modules: Modules, blocks: Sequence[str] = ()) -> Trace:
    """Learn in which order layers are called, which share one input, and whether the blocks form a chain."""
    calls: dict[str, list[str]] = {}
    found = Trace(chained=len(blocks) > 1)
    place = {b: i for i, b in enumerate(blocks)}
    watched = {p: m for p, (_, m) in modules.items()} | {b: bridge.get_module(model, b) for b in blocks}
    for index, batch in enumerate(dataset):
        alive: list[Any] = []  # kept, so that an id stands for one tensor
        first: dict[int, str] = {}
        called: set[str] = set()
        outputs: dict[str, Any] = {}

        def seen(path: str, args: Any, kwargs: Any, output: Any) -> None:
            x = input_of(args, kwargs)
            if path in place:
                if path in outputs or (place[path] and x is not outputs.get(blocks[place[path] - 1])):  # noqa: B023
                    found.chained = False
                outputs[path] = first_tensor(output)  # noqa: B023
                return
            name = modules[path][0]
            alive.append(x)  # noqa: B023
            if name in called:  # noqa: B023
                found.repeated.add(name)
            called.add(name)  # noqa: B023
            calls.setdefault(name, []).append(f"{index}:{first.setdefault(id(x), name)}")  # noqa: B023

        with quiet(model), bridge.hooked(watched, seen):
            send(model, batch)
        found.chained = found.chained and len(outputs) == len(blocks)
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, steps in calls.items():
        # Convolutions unfold by their own geometry, so only matrix layers share moments.
        alone = isinstance(bridge.get_module(model, name), torch.nn.Conv2d)
        shared.setdefault((name if alone else "", *steps), []).append(name)
    found.feeds = [tuple(names) for names in shared.values()]
    return found


def trace_block(path: str, block: torch.nn.Module, inputs: BlockInputs, modules: Modules) -> Trace:
    """The same for one block that is fed from memory; `modules` carries whole paths."""
    start = len(path) + 1
    inner = {p[start:]: (name[start:], m) for p, (name, m) in modules.items()}
    found = trace(block, [inputs.call(path, i) for i in range(len(inputs.valid))], inner)
    found.feeds = [tuple(f"{path}.{n}" for n in feed) for feed in found.feeds]
    found.repeated = {f"{path}.{n}" for n in found.repeated}
    return found


class ModelStage:
    """A whole model as one stage.

    Args:
        model: the model that becomes sparse.
        dense: its twin that stays dense, or None.
        dataset: batches.
        modules: path -> (layer, module of `model`).
        feeds: layers in the order they are called; those that share an input together.
        repeated: layers that are called more than once in a forward.
        whole: whether it is all of the model, and not what stands before or after its blocks.

    Attributes:
        joined: layer -> where its output has been added to the residual stream; known for blocks only.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dense: torch.nn.Module | None,
        dataset: Iterable[Any],
        modules: Modules,
        feeds: Sequence[tuple[str, ...]],
        repeated: set[str],
        whole: bool = True,
    ) -> None:
        self.model, self.dense, self.dataset, self.modules = model, dense, dataset, modules
        self._whole = whole
        self.feeds, self.repeated = list(feeds), repeated
        self.joined: dict[str, str] = {}

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch for the sparse model, for the dense one, and which of its tokens are no padding."""
        for batch in self.dataset:
            yield batch, batch, valid_tokens(batch)

    def replay(self, names: Sequence[str], seen: Seen) -> None:
        """Send every batch through, calling ``seen(name, x, dense x, drift)`` at each call of the layers.

        The drift is what else reaches the sum that the layer's output joins: the dense model's minus this one's.
        """
        joined = {p: self.joined[p] for p, (name, _) in self.modules.items() if name in names and p in self.joined}
        until = self._following(names, joined)
        for batch, dense_batch, valid in self.batches():
            waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

            def first(name: str, x: torch.Tensor, rest: torch.Tensor | None) -> None:
                waiting.setdefault(name, []).append((x, rest))  # noqa: B023

            def both(name: str, x: torch.Tensor, rest: torch.Tensor | None) -> None:
                queue = waiting.get(name)  # noqa: B023
                dense_x, dense_rest = queue.pop(0) if queue else (None, None)
                same = rest is not None and dense_rest is not None and rest.shape == dense_rest.shape
                seen(name, x, dense_x, dense_rest - rest if same else None)  # type: ignore[operator]

            if self.dense is not None:
                self._watch(self.dense, names, dense_batch, valid, until, joined, first)
            self._watch(self.model, names, batch, valid, until, joined, both)

    def join(self) -> None:
        """No residual stream is known outside blocks."""
        if self._whole:
            raise UnsupportedError(
                "SparseConfig.residual needs a model that is a chain of blocks, each fed by the last"
            )

    def advance(self) -> None:
        """Nothing follows a whole model."""

    def _following(self, names: Sequence[str], joined: Mapping[str, str]) -> str | None:
        """The module at whose call a forward may end: the first layer called after all of `names` and their sums."""
        if self.repeated or joined:
            ends = set(joined.values())
            return ends.pop() or None if len(names) == len(ends) == 1 and not self.repeated else None
        last = max((i for i, feed in enumerate(self.feeds) if set(feed) & set(names)), default=-1)
        return self.feeds[last + 1][0] if last + 1 < len(self.feeds) else None

    def _watch(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        batch: Any,
        valid: torch.Tensor | None,
        until: str | None,
        joined: Mapping[str, str],
        seen: Callable[[str, torch.Tensor, torch.Tensor | None], None],
    ) -> None:
        wanted = {p: bridge.get_module(model, p) for p, (name, _) in self.modules.items() if name in set(names)}
        waiting: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(path: str, args: Any, kwargs: Any, output: Any) -> None:
            x = as_input(wanted[path], input_of(args, kwargs), valid)
            if path in joined:
                waiting[path] = (x, output.detach())
            else:
                seen(self.modules[path][0], x, None)

        def arrived(place: str, total: Any) -> None:
            for path in [p for p in waiting if joined[p] == place]:
                x, output = waiting.pop(path)
                fits = isinstance(total, torch.Tensor) and total.shape == output.shape
                rest = as_input(wanted[path], total.float() - output.float(), valid) if fits else None
                seen(self.modules[path][0], x, rest)

        with quiet(model), bridge.hooked(wanted, hook), arriving(model, sorted(set(joined.values())), arrived):
            # After the hooks above: the forward may end where a sum arrives.
            stop = bridge.get_module(model, until).register_forward_pre_hook(enough) if until else None
            try:
                with contextlib.suppress(Enough):
                    send(model, batch)
            finally:
                if stop is not None:
                    stop.remove()
        for path, (x, _) in waiting.items():
            seen(self.modules[path][0], x, None)


class BlockStage(ModelStage):
    """One block of a chain: it is fed from memory, so that no other part of the model runs.

    Args:
        path: the block's path, with which the layers' paths begin.
        inputs: what each batch gives the block; shared with the stages of the other blocks.
    """

    def __init__(
        self,
        path: str,
        block: torch.nn.Module,
        dense: torch.nn.Module | None,
        inputs: BlockInputs,
        modules: Modules,
        feeds: Sequence[tuple[str, ...]],
        repeated: set[str],
    ) -> None:
        start = len(path) + 1
        inner = {p[start:]: (name[start:], m) for p, (name, m) in modules.items()}
        short = [tuple(n[start:] for n in feed) for feed in feeds]
        super().__init__(block, dense, (), inner, short, {n[start:] for n in repeated})
        self.path, self.inputs = path, inputs
        self.feeds = list(feeds)
        self._short = short

    def join(self) -> None:
        """Find by one batch where outputs join the residual stream."""
        # Layers that share an input share its moments, and so can have no drift of their own.
        single = [feed[0] for feed in self._short if len(feed) == 1]
        alone = [name for name in single if not isinstance(bridge.get_module(self.model, name), torch.nn.Conv2d)]
        if self.dense is not None and self.inputs.valid:
            with quiet(self.model):
                self.joined = joints(self.model, lambda: send(self.model, self.inputs.call(self.path, 0)), alone)

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch's call of this block."""
        for index, valid in enumerate(self.inputs.valid):
            yield self.inputs.call(self.path, index), self.inputs.call(self.path, index, dense=True), valid

    def replay(self, names: Sequence[str], seen: Seen) -> None:
        """Send every batch through the block."""
        start = len(self.path) + 1
        full = {n[start:]: n for n in names}
        super().replay(list(full), lambda name, x, dense, drift: seen(full[name], x, dense, drift))

    def advance(self) -> None:
        """The block's outputs become the next block's inputs."""
        for index in range(len(self.inputs.valid)):
            for model, dense in ((self.model, False), (self.dense, True)):
                if model is not None:
                    with quiet(model):
                        out = first_tensor(send(model, self.inputs.call(self.path, index, dense=dense)))
                    self.inputs.put(index, out, dense=dense)

    def _following(self, names: Sequence[str], joined: Mapping[str, str]) -> str | None:
        whole, self.feeds = self.feeds, self._short
        try:
            return super()._following(names, joined)
        finally:
            self.feeds = whole
