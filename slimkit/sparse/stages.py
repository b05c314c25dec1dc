"""Sending calibration data through a torch model, whole or block by block, while watching some layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError

import torch
import torch.nn.functional as F

Modules = Mapping[str, tuple[str, torch.nn.Module]]  # path -> (layer it belongs to, module)
Seen = Callable[[str, torch.Tensor, torch.Tensor | None], None]


class _Enough(Exception):
    """Raised inside a forward to end it: every layer that was watched has been seen."""


def _enough(*_: Any) -> None:
    raise _Enough


@contextlib.contextmanager
def quiet(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, caches or fused paths that would pass the layers by."""
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        if cache:
            config.use_cache = False  # a key-value cache would grow with every replay
        torch.backends.mha.set_fastpath_enabled(False)
        with bridge.evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if cache:
            config.use_cache = cache


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A layer's input as it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def as_input(module: torch.nn.Module, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """A layer's input as the core takes it: padded for a convolution, without the rows of padding tokens."""
    x = x.detach()
    if isinstance(module, torch.nn.Conv2d):
        pads = module._reversed_padding_repeated_twice
        if any(pads):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, pads, mode=mode)
    elif valid is not None and x.ndim == 3 and x.shape[:2] == valid.shape:
        x = x[valid.to(x.device)]
    return x


def valid_tokens(batch: Any) -> torch.Tensor | None:
    """Which tokens of a batch are no padding: its 2-D attention mask of zeros and ones, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


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
                outputs[path] = hidden_of(output)  # noqa: B023
                return
            name = modules[path][0]
            alive.append(x)  # noqa: B023
            if name in called:  # noqa: B023
                found.repeated.add(name)
            called.add(name)  # noqa: B023
            calls.setdefault(name, []).append(f"{index}:{first.setdefault(id(x), name)}")  # noqa: B023

        with quiet(model), bridge.hooked(watched, seen):
            _run(model, batch)
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


def hidden_of(output: Any) -> Any:
    """The hidden states in a block's output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


class ModelStage:
    """A whole model as one stage.

    Args:
        model: the model that becomes sparse.
        dense: its twin that stays dense, or None.
        dataset: batches.
        modules: path -> (layer, module of `model`).
        feeds: layers in the order they are called; those that share an input together.
        repeated: layers that are called more than once in a forward.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dense: torch.nn.Module | None,
        dataset: Iterable[Any],
        modules: Modules,
        feeds: Sequence[tuple[str, ...]],
        repeated: set[str],
    ) -> None:
        self.model, self.dense, self.dataset, self.modules = model, dense, dataset, modules
        self.feeds, self.repeated = list(feeds), repeated

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch for the sparse model, for the dense one, and which of its tokens are no padding."""
        for batch in self.dataset:
            yield batch, batch, valid_tokens(batch)

    def replay(self, names: Sequence[str], seen: Seen) -> None:
        """Send every batch through, calling ``seen(name, x, dense x or None)`` at each call of the layers."""
        until = self._following(names)
        for batch, dense_batch, valid in self.batches():
            waiting: dict[str, list[torch.Tensor]] = {}
            if self.dense is not None:
                self._watch(
                    self.dense,
                    names,
                    dense_batch,
                    valid,
                    until,
                    lambda name, x: waiting.setdefault(name, []).append(x),  # noqa: B023
                )

            def both(name: str, x: torch.Tensor) -> None:
                queue = waiting.get(name)  # noqa: B023
                seen(name, x, queue.pop(0) if queue else None)

            self._watch(self.model, names, batch, valid, until, both)

    def advance(self) -> None:
        """Nothing follows a whole model."""

    def _following(self, names: Sequence[str]) -> str | None:
        """The layer at whose call a forward may end: the first one called after all of `names`."""
        if self.repeated:
            return None
        last = max((i for i, feed in enumerate(self.feeds) if set(feed) & set(names)), default=-1)
        return self.feeds[last + 1][0] if last + 1 < len(self.feeds) else None

    def _watch(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        batch: Any,
        valid: torch.Tensor | None,
        until: str | None,
        seen: Callable[[str, torch.Tensor], None],
    ) -> None:
        wanted = {p: bridge.get_module(model, p) for p, (name, _) in self.modules.items() if name in set(names)}

        def hook(path: str, args: Any, kwargs: Any, _output: Any) -> None:
            seen(self.modules[path][0], as_input(wanted[path], input_of(args, kwargs), valid))

        stop = bridge.get_module(model, until).register_forward_pre_hook(_enough) if until else None
        try:
            with quiet(model), bridge.hooked(wanted, hook), contextlib.suppress(_Enough):
                _run(model, batch)
        finally:
            if stop is not None:
                stop.remove()


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

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch's call of this block."""
        for index, valid in enumerate(self.inputs.valid):
            yield self.inputs.call(self.path, index), self.inputs.call(self.path, index, dense=True), valid

    def replay(self, names: Sequence[str], seen: Seen) -> None:
        """Send every batch through the block."""
        start = len(self.path) + 1
        full = {n[start:]: n for n in names}
        super().replay(list(full), lambda name, x, dense: seen(full[name], x, dense))

    def advance(self) -> None:
        """The block's outputs become the next block's inputs."""
        for index in range(len(self.inputs.valid)):
            for model, dense in ((self.model, False), (self.dense, True)):
                if model is not None:
                    with quiet(model):
                        out = hidden_of(_run(model, self.inputs.call(self.path, index, dense=dense)))
                    self.inputs.put(index, out, dense=dense)

    def _following(self, names: Sequence[str]) -> str | None:
        whole, self.feeds = self.feeds, self._short
        try:
            return super()._following(names)
        finally:
            self.feeds = whole


@dataclass(frozen=True)
class Bound:
    """A ready call of a block: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_HIDDEN = object()  # stands where a call takes the hidden states


def _run(model: torch.nn.Module, batch: Any) -> Any:
    return model(*batch.args, **batch.kwargs) if isinstance(batch, Bound) else bridge.run(model, batch)


class BlockInputs:
    """What every batch gives every block: hidden states, which move on, and the other arguments, which stay.

    Args:
        model: the model; its layers before the blocks are done.
        dense: its dense twin, or None.
        dataset: batches.
        blocks: the blocks' paths, a chain.
    """

    def __init__(
        self, model: torch.nn.Module, dense: torch.nn.Module | None, dataset: Iterable[Any], blocks: Sequence[str]
    ) -> None:
        self.valid: list[torch.Tensor | None] = []
        self._hidden: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._others: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.paired = dense is not None
        for batch in dataset:
            self.valid.append(valid_tokens(batch))
            others: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            first: list[torch.Tensor] = []

            def seen(path: str, args: Any, kwargs: Any, _output: Any) -> None:
                x = input_of(args, kwargs)
                if path == blocks[0]:
                    first.append(x)  # noqa: B023
                blank = {k: _HIDDEN if v is x else v for k, v in kwargs.items()}
                others[path] = (tuple(_HIDDEN if a is x else a for a in args), blank)  # noqa: B023

            with quiet(model), bridge.hooked({b: bridge.get_module(model, b) for b in blocks}, seen):
                bridge.run(model, batch)
            self._others.append(others)
            self._hidden[False].append(first[0])
            if dense is not None:
                first.clear()
                head = bridge.get_module(dense, blocks[0])
                with quiet(dense), bridge.hooked({blocks[0]: head}, seen):
                    bridge.run(dense, batch)
                self._hidden[True].append(first[0])

    @classmethod
    def of_stubs(
        cls,
        model: torch.nn.Module,
        calls: Sequence[Bound],
        valid: Sequence[torch.Tensor | None],
        blocks: Sequence[str],
    ) -> BlockInputs:
        """The same for a model of whose blocks only the first is in memory: the others pass their input on.

        Args:
            model: the model, ready to run up to and including its first block.
            calls: the batches.
            valid: which tokens of each batch are no padding.
            blocks: the blocks' paths, a chain.
        """
        self = cls.__new__(cls)
        self.valid, self._hidden, self._others, self.paired = list(valid), {False: [], True: []}, [], True
        modules = {b: bridge.get_module(model, b) for b in blocks}
        wraps: list[bool] = []

        def look(_path: str, _args: Any, _kwargs: Any, output: Any) -> None:
            wraps.append(isinstance(output, (tuple, list)))
            raise _Enough

        for call in calls[:1]:
            with quiet(model), bridge.hooked({blocks[0]: modules[blocks[0]]}, look), contextlib.suppress(_Enough):
                _run(model, call)
        for call in calls:
            others: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            first: list[torch.Tensor] = []

            def stub(path: str, *args: Any, **kwargs: Any) -> Any:
                x = input_of(args, kwargs)
                first.append(x)  # noqa: B023
                blank = {k: _HIDDEN if v is x else v for k, v in kwargs.items()}
                others[path] = (tuple(_HIDDEN if a is x else a for a in args), blank)  # noqa: B023
                if path == blocks[-1]:
                    raise _Enough
                return (x,) if wraps[0] else x

            try:
                for path, module in modules.items():
                    module.__dict__["forward"] = partial(stub, path)
                with quiet(model), contextlib.suppress(_Enough):
                    _run(model, call)
            finally:
                for module in modules.values():
                    module.__dict__.pop("forward", None)
            if len(others) != len(blocks) or any(x is not first[0] for x in first):
                raise UnsupportedError("src must be a model whose blocks pass hidden states straight to the next.")
            self._others.append(others)
            self._hidden[False].append(first[0].detach())
            self._hidden[True].append(first[0].detach())
        return self

    def save(self, folder: Path) -> None:
        """Write the hidden states of every batch, one file each."""
        from safetensors.torch import save_file

        for index, (sparse, dense) in enumerate(zip(self._hidden[False], self._hidden[True])):
            states = {"sparse": sparse.contiguous(), "dense": dense.contiguous().clone()}
            save_file(states, folder / f"{index:06d}.safetensors")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        from safetensors.torch import load_file

        for index in range(len(self.valid)):
            found = load_file(folder / f"{index:06d}.safetensors")
            self._hidden[False][index], self._hidden[True][index] = found["sparse"], found["dense"]

    def call(self, path: str, index: int, dense: bool = False) -> Any:
        """One batch's call of a block as (args, kwargs)."""
        args, kwargs = self._others[index][path]
        hidden = self._hidden[dense and self.paired][index]
        return Bound(
            tuple(hidden if a is _HIDDEN else a for a in args),
            {k: hidden if v is _HIDDEN else v for k, v in kwargs.items()},
        )

    def put(self, index: int, hidden: torch.Tensor, dense: bool = False) -> None:
        """The hidden states that the next block gets."""
        self._hidden[dense][index] = hidden
