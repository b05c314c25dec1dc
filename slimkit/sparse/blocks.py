"""Sending calibration data through a torch model, whole or block by block, while watching some layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse.call_order import CallOrder, batch_shape
from slimkit.core.sparse.experts import LayerCall, Pairs
from slimkit.replay import entering, replaying, state_of, version_of
from slimkit.sparse.inputs import BlockInputs, Enough, as_input, enough, head_of, valid_tokens
from slimkit.sparse.reads import Reads
from slimkit.sparse.residual import arriving, first_tensor, input_of
from slimkit.sparse.slots import WeightSlot
from slimkit.sparse.trained import TorchTrained, output_of

import torch

Modules = Mapping[str, tuple[str, WeightSlot]]  # path -> (layer it belongs to, where its weight lies)
Seen = Callable[[str, torch.Tensor, torch.Tensor | None, torch.Tensor | None], None]


@contextlib.contextmanager
def watching(
    model: torch.nn.Module,
    slots: Mapping[str, WeightSlot],
    called: Callable[[str, Any, Any, Any], None],
    read: Callable[[str, torch.Tensor, torch.Tensor | None], None],
    valid: torch.Tensor | None = None,
) -> Iterator[Callable[[Any], Any]]:
    """Watch layers while batches are replayed: those that are called, and those whose weights are read without a call.

    Args:
        model: the model.
        slots: path -> where the layer's weight lies.
        called: gets path, args, kwargs and output after each call.
        read: gets path, rows and the tokens they are before each use without a call.
        valid: which tokens of the batch are no padding.

    Returns:
        What sends a batch through the model.
    """
    modules = {p: s.owner(model) for p, s in slots.items() if not s.read}
    reads = {p: s for p, s in slots.items() if s.read}

    def each(paths: list[str], rows: torch.Tensor, tokens: torch.Tensor | None) -> None:
        for path in paths:
            read(path, rows, tokens)

    with replaying(model) as run, bridge.hooked(modules, called), contextlib.ExitStack() as stack:
        if reads:
            stack.enter_context(Reads(model, reads, each, valid))
        yield run


def trace(
    model: torch.nn.Module,
    dataset: Iterable[Any],
    modules: Modules,
    blocks: Sequence[str] = (),
    inputs: BlockInputs | None = None,
) -> tuple[CallOrder, bool]:
    """Send every batch through once, to learn in which order layers are called and which share one input.

    A batch like one that ran whole ends when every layer was called, and none runs what makes logits, unless that is a
    layer to watch.

    Args:
        model: the model.
        dataset: batches.
        modules: path -> (layer, where its weight lies).
        blocks: the paths of what may be a chain of blocks.
        inputs: learns what every batch gives the blocks, as long as they are a chain.

    Returns:
        The calls, and whether each block's first input is the output of the block before, in every batch, and all
        else that it reads was there before the batch or is among its arguments.
    """
    names = {name for name, _ in modules.values()}
    calls = CallOrder({name for name, slot in modules.values() if slot.kind == "conv2d"}, n_layers=len(names))
    chained = len(blocks) > 1
    place = {b: i for i, b in enumerate(blocks)}
    slots = {p: slot for p, (_, slot) in modules.items()}
    chain = {b: bridge.get_module(model, b) for b in blocks}
    head = head_of(model)
    watched = head is None or any(m is slot.owner(model) for slot in slots.values() for m in head.modules())
    entered: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    complete = False

    def passed(path: str, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs[path] = first_tensor(output)

    def began(path: str, args: Any, kwargs: Any) -> None:
        nonlocal chained
        x = input_of(args, kwargs)
        if path in entered or (place[path] and x is not outputs.get(blocks[place[path] - 1])):
            chained = False
        # What the model hands a block in another way than by its call would be missing when it runs alone.
        chained = chained and not before[path].differs()
        entered[path] = True
        if chained and inputs is not None:
            inputs.note(path, args, kwargs)
        _end()

    def _end() -> None:
        if complete and len(entered) == len(blocks):
            raise Enough

    def called(path: str, args: Any, kwargs: Any, _output: Any = None) -> None:
        nonlocal complete
        x = input_of(args, kwargs)
        complete = calls.note(modules[path][0], x, version_of(x))

    def entering_layer(path: str, args: Any, kwargs: Any) -> None:
        called(path, args, kwargs)
        _end()

    def read(path: str, rows: torch.Tensor, _tokens: torch.Tensor | None) -> None:
        calls.note(modules[path][0], rows, version_of(rows))

    plain = {p: s.owner(model) for p, s in slots.items() if not s.read}
    for batch in dataset:
        valid = valid_tokens(batch)
        calls.batch(valid is not None and not bool(valid.any()), batch_shape(batch))
        entered, outputs, complete = {}, {}, False
        if inputs is not None:
            inputs.begin(batch)
        with (
            watching(model, {p: s for p, s in slots.items() if s.read}, called, read) as run,
            bridge.hooked(chain, passed),
            entering(plain, entering_layer),
            _ending(None if watched else head),
            contextlib.suppress(Enough),
        ):
            before = {path: state_of(block.modules()) for path, block in chain.items()}
            with entering(chain, began):
                run(batch)
        if not complete:
            calls.ran()
        chained = chained and len(entered) == len(blocks)
    return calls, chained


class WholeModel:
    """A whole model as one stage.

    Args:
        model: the model that becomes sparse.
        dense: its twin that stays dense, or None.
        dataset: batches.
        modules: path in `model` -> (layer, where its weight lies).
        feeds: its layers in the order they are called; those that share an input together.
        traced: what a forward taught of the order of calls.
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
        traced: CallOrder,
        whole: bool = True,
    ) -> None:
        self.model, self.dense, self.dataset, self.modules = model, dense, dataset, modules
        self._whole, self._traced = whole, traced
        self.feeds = list(feeds)
        self.names: list[str] = []
        self.rows: Mapping[str, dict[str, Any]] | None = None
        self.reached: Mapping[str, float] = traced.reached
        self.joined: dict[str, str] = {}

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch for the sparse model, for the dense one, and which of its tokens are no padding."""
        for batch in self.dataset:
            yield batch, batch, valid_tokens(batch)

    def replay(self, names: Sequence[str], seen: Seen, ended: Callable[[], None] | None = None) -> None:
        """Send every batch through, calling ``seen(name, x, dense x, drift)`` at each call of the layers.

        The drift is what else reaches the sum that the layer's output joins: the dense model's minus this one's.
        `ended` is called after each batch.
        """
        joined = {p: self.joined[p] for p, (name, _) in self.modules.items() if name in names and p in self.joined}
        last = self._last(names) if not joined else None
        until = self._following(names, joined) if last is None else None
        for batch, dense_batch, valid in self.batches():
            pairs = Pairs(seen, self.dense is not None)
            if self.dense is not None:
                self._watch(self.dense, names, dense_batch, valid, until, last, joined, pairs.dense)
            self._watch(self.model, names, batch, valid, until, last, joined, pairs.sparse)
            if ended is not None:
                ended()

    def join(self) -> None:
        """No residual stream is known outside blocks."""
        if self._whole:
            raise UnsupportedError(
                "SparseConfig.residual needs a model that is a chain of blocks, each fed by the last"
            )

    def outputs(self) -> Iterator[torch.Tensor]:
        """What each batch gives as the part is now, in float32 and without the rows of padding."""
        with replaying(self.model) as run:
            for batch, _, valid in self.batches():
                yield as_input(self.model, output_of(run(batch)), valid).float()

    def trained(self, inherited: float = 1.0) -> TorchTrained | None:
        """The whole model, to give the dense one's outputs; nothing where blocks do so. It inherits no error."""
        if not self._whole:
            return None
        assert self.dense is not None  # a method that reconstructs is paired
        calls = list(self.dataset)
        with replaying(self.dense) as run:
            targets = [output_of(run(batch)) for batch in calls]
        slots = [slot for _, slot in self.modules.values()]
        return TorchTrained(
            self.model, slots, len(calls), calls.__getitem__, targets.__getitem__, [valid_tokens(b) for b in calls]
        )

    def advance(self) -> None:
        """Nothing follows a whole model."""

    def _last(self, names: Sequence[str]) -> str | None:
        """The path of the layer at whose call a forward may end that watches these alone; None where none is known."""
        last = self._traced.last(names)
        found = next(((p, slot) for p, (name, slot) in self.modules.items() if name == last), None)
        return None if found is None or found[1].read else found[0]

    def _following(self, names: Sequence[str], joined: Mapping[str, str]) -> str | None:
        """The path at whose call a forward may end: what every batch calls after all of `names` and their sums."""
        if joined:
            ends = set(joined.values())
            return ends.pop() or None if len(names) == len(ends) == 1 and not self._traced.repeated else None
        mine: dict[str, str] = {}
        for path, (name, _) in self.modules.items():
            mine.setdefault(name, path)
        last = self._traced.following(names, (n for feed in self._traced.feeds for n in feed if n in mine))
        return None if last is None else mine[last]

    def _watch(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        batch: Any,
        valid: torch.Tensor | None,
        until: str | None,
        last: str | None,
        joined: Mapping[str, str],
        seen: Callable[[str, LayerCall], None],
    ) -> None:
        asked = set(names)
        wanted = {p: slot for p, (name, slot) in self.modules.items() if name in asked}
        waiting: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def called(path: str, args: Any, kwargs: Any, output: Any = None) -> None:
            x = as_input(wanted[path].owner(model), input_of(args, kwargs), valid)
            if path in joined:
                waiting[path] = (x, output.detach().clone())  # a sum may be made in its memory
            else:
                seen(self.modules[path][0], LayerCall(x))

        def read(path: str, rows: torch.Tensor, tokens: torch.Tensor | None) -> None:
            if path == until:
                raise Enough
            seen(self.modules[path][0], LayerCall(rows, tokens=tokens))

        def arrived(place: str, total: Any) -> None:
            for path in [p for p in waiting if joined[p] == place]:
                x, output = waiting.pop(path)
                fits = isinstance(total, torch.Tensor) and total.shape == output.shape
                rest = as_input(wanted[path].owner(model), total.float() - output.float(), valid) if fits else None
                seen(self.modules[path][0], LayerCall(x, rest))

        def ending(path: str, args: Any, kwargs: Any) -> None:
            called(path, args, kwargs)
            raise Enough

        after = self.modules.get(until) if until is not None else None
        end = {until: after[1]} if until is not None and after is not None and after[1].read else {}
        final = {last: wanted[last].owner(model)} if last is not None else {}
        others = {p: slot for p, slot in wanted.items() if p != last}
        with (
            contextlib.suppress(Enough),
            watching(model, others | end, called, read, valid) as run,
            arriving(model, sorted(set(joined.values())), arrived),
            # After the hooks above: the forward may end where a sum arrives.
            _ending(bridge.get_module(model, until) if until and not end else None),
            entering(final, ending),
        ):
            run(batch)
        for path, (x, _) in waiting.items():
            seen(self.modules[path][0], LayerCall(x))


@contextlib.contextmanager
def _ending(module: torch.nn.Module | None) -> Iterator[None]:
    """End the forward when the module is called."""
    stop = None if module is None else module.register_forward_pre_hook(enough)
    try:
        yield
    finally:
        if stop is not None:
            stop.remove()
