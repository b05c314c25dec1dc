"""Sending calibration data through a MindSpore cell while watching some layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from slimkit.core.batch import Call
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse.call_order import CallOrder, batch_shape
from slimkit.core.sparse.experts import LayerCall, Pairs
from slimkit_ms import bridge, kinds
from slimkit_ms.chain import block_paths, first_tensor, hooks, valid_tokens
from slimkit_ms.replay import replaying
from slimkit_ms.sparse.reads import Reads
from slimkit_ms.sparse.residual import arriving, chained, joints
from slimkit_ms.sparse.slots import PARTS, WeightSlot, attended
from slimkit_ms.sparse.trained import MindSporeTrained

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]
Seen = Callable[[str, Array, Array | None, Array | None], None]


_END = ""  # the name of the weight whose use ends a forward; no layer has it


class _Enough(Exception):
    """Raised inside a forward to end it: every layer that was watched has been seen."""


def _enough(*_: Any) -> None:
    raise _Enough


@contextlib.contextmanager
def watching(
    model: nn.Cell,
    slots: Mapping[str, WeightSlot],
    seen: Callable[[str, Any, Array | None], None],
    until: WeightSlot | None = None,
    valid: Array | None = None,
) -> Iterator[Callable[[Any], Any]]:
    """Replay batches, calling ``seen(name, input, tokens)`` before each use of the layers' weights.

    Args:
        model: the cell.
        slots: layer -> where its weight lies.
        seen: gets the layer, its input (of an expert the rows, in NumPy) and which tokens these are, if that is known.
        until: ends the forward before the use of this weight.
        valid: which tokens of the batch are no padding.

    Returns:
        What sends a batch through the cell, to where `until` ends it.
    """
    handles = []

    def hook(name: str, part: str) -> Callable[..., None]:
        if part == "out":
            return lambda cell, args, kwargs: seen(name, attended(cell, args, kwargs), None)
        place = PARTS.index(part) if part else 0
        return lambda _cell, args, kwargs: seen(name, kwargs[part] if part in kwargs else args[place], None)

    def before(slot: WeightSlot, call: Callable[..., None]) -> None:
        cell = bridge.get_module(model, slot.caller)
        handles.append(cell.register_forward_pre_hook(call, with_kwargs=True))

    def read(name: str, rows: Array, tokens: Array | None) -> None:
        if name == _END:
            raise _Enough
        seen(name, rows, tokens)

    reads = {name: slot for name, slot in slots.items() if slot.read}
    if until is not None and until.read:
        reads[_END] = until
    try:
        # Attention is asked for its output layer's input last, as it would come to it.
        for name, slot in sorted(slots.items(), key=lambda item: item[1].part == "out"):
            if not slot.read:
                before(slot, hook(name, slot.part))
        if until is not None and not until.read:
            before(until, _enough)
        with replaying(model) as run, contextlib.suppress(_Enough), contextlib.ExitStack() as stack:
            if reads:
                stack.enter_context(Reads(model, reads, read, valid))
            yield run
    finally:
        for handle in handles:
            handle.remove()


def unwatched(_name: str, _x: Any, _tokens: Any) -> None:
    """For a forward in which no layer is watched."""


def trace(
    model: nn.Cell, dataset: Iterable[Any], slots: Mapping[str, WeightSlot], blocks: Sequence[str] = ()
) -> CallOrder:
    """Send every batch through once, to learn in which order layers are called and which share one input.

    A batch like one that ran whole ends when every layer was called and every one of `blocks` was entered.
    """
    calls = CallOrder({name for name, slot in slots.items() if slot.kind == "conv2d"}, n_layers=len(slots))
    plain = not any(slot.read or slot.part for slot in slots.values())
    entered: set[str] = set()
    complete = False

    def note(name: str, x: Any, _tokens: Any) -> None:
        nonlocal complete
        # A tensor that was written into in between is another input; nobody counts the writes, so its sum tells.
        complete = calls.note(name, x, float(x.astype(ms.float32).sum()) if isinstance(x, ms.Tensor) else None)
        end()

    def end() -> None:
        if complete and plain and len(entered) == len(blocks):
            raise _Enough

    def entering(path: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            entered.add(path)
            end()

        return enter

    for batch in dataset:
        valid = valid_tokens(batch)
        calls.batch(valid is not None and not valid.any(), batch_shape(batch))
        entered.clear()
        complete = False
        with hooks() as handles, watching(model, slots, note) as run:
            handles += [bridge.get_module(model, b).register_forward_pre_hook(entering(b)) for b in blocks]
            run(batch)
        if not complete:
            calls.ran()
    return calls


def as_input(cell: nn.Cell, x: ms.Tensor, valid: Array | None = None) -> Array:
    """A layer's input as a float32 NumPy array: padded for a convolution, without the rows of padding tokens."""
    values = bridge.as_numpy(x.astype(ms.float32))
    if kinds.is_kind(cell, "conv"):
        return np.pad(values, [(0, 0), (0, 0), *kinds.pads_of(cell, values.shape[2:])])
    return values[valid] if valid is not None and values.ndim == 3 and values.shape[:2] == valid.shape else values


class WholeModel:
    """A whole cell as one stage.

    Args:
        model: the cell that becomes sparse.
        dense: its twin that stays dense, or None.
        dataset: batches.
        slots: where the layers' weights lie.
        feeds: layers in the order they are called; those that share an input together.
        traced: what a forward taught of the order of calls.
        whole: whether it is all of the cell, and not what stands before or after its blocks.
    """

    def __init__(
        self,
        model: nn.Cell,
        dense: nn.Cell | None,
        dataset: Iterable[Any],
        slots: Mapping[str, WeightSlot],
        feeds: Sequence[tuple[str, ...]],
        traced: CallOrder,
        whole: bool = True,
    ) -> None:
        self.model, self.dense, self.dataset = model, dense, dataset
        self.slots, self._whole = slots, whole
        self.feeds, self._traced = list(feeds), traced
        self.names: list[str] = []
        self.rows: Mapping[str, dict[str, Any]] | None = None
        self.reached: Mapping[str, float] = traced.reached
        self.joined: dict[str, str] = {}
        self._blocks: list[str] = []

    def replay(self, names: Sequence[str], seen: Seen, ended: Callable[[], None] | None = None) -> None:
        """Send every batch through, calling ``seen(name, x, dense x, drift)`` at each use of the layers.

        The drift is what else reaches the sum that the layer's output joins: the dense model's minus this one's.
        `ended` is called after each batch.
        """
        joined = any(name in self.joined for name in names)
        last = None if joined else self._traced.last(names)
        last = None if last is None or self.slots[last].read or self.slots[last].part else last
        until = self._traced.following(names, (n for feed in self.feeds for n in feed)) if not joined else None
        for batch, dense_batch, valid in self.batches():
            pairs = Pairs(seen, self.dense is not None)
            if self.dense is not None:
                self._watch(self.dense, names, dense_batch, valid, until, last, pairs.dense)
            self._watch(self.model, names, batch, valid, until, last, pairs.sparse)
            if ended is not None:
                ended()

    def batches(self) -> Iterator[tuple[Any, Any, Array | None]]:
        """Each batch for the sparse model, for the dense one, and which of its tokens are no padding."""
        for batch in self.dataset:
            yield batch, batch, valid_tokens(batch)

    def join(self) -> None:
        """Find by one batch where outputs join the residual stream."""
        blocks = block_paths(self.model, self.slots)
        batch = next(iter(self.dataset))
        with watching(self.model, {}, unwatched) as send:
            run = partial(send, batch)
            chain = bool(blocks) and chained(self.model, run, blocks)
            # Layers that share an input share its moments, and so can have no drift of their own.
            single = [feed[0] for feed in self.feeds if len(feed) == 1]
            alone = [
                n
                for n in single
                if self.slots[n].kind == "linear" and not self.slots[n].part and not self.slots[n].read
            ]
            self.joined = joints(self.model, run, alone, blocks) if chain else {}
        if not chain:
            raise UnsupportedError(
                "SparseConfig.residual needs a model that is a chain of blocks, each fed by the last"
            )
        self._blocks = blocks

    def outputs(self) -> Iterator[Array]:
        """What each batch gives as the part is now, in float32 and without the rows of padding."""
        with replaying(self.model) as run:
            for batch, _, valid in self.batches():
                yield as_input(self.model, first_tensor(run(batch)), valid)

    def trained(self, inherited: float = 1.0) -> MindSporeTrained | None:
        """The whole cell, to give the dense one's outputs; nothing where blocks do so. It inherits no error."""
        if not self._whole:
            return None
        assert self.dense is not None  # a method that reconstructs is paired
        calls = [bridge.call_of(batch) for batch in self.dataset]
        with replaying(self.dense) as run:
            targets = [bridge.as_numpy(first_tensor(run(Call(*call))).astype(ms.float32)) for call in calls]
        return MindSporeTrained(
            self.model,
            list(self.slots.values()),
            len(calls),
            calls.__getitem__,
            targets.__getitem__,
            [valid_tokens(batch) for batch in self.dataset],
        )

    def advance(self) -> None:
        """Nothing follows a whole cell."""

    def _watch(
        self,
        model: nn.Cell,
        names: Sequence[str],
        batch: Any,
        valid: Array | None,
        until: str | None,
        last: str | None,
        seen: Callable[[str, LayerCall], None],
    ) -> None:
        inputs: dict[str, Array] = {}
        waiting: dict[str, tuple[Array, Array]] = {}

        def call(name: str, x: Any, tokens: Array | None) -> None:
            if self.slots[name].read:
                seen(name, LayerCall(x, tokens=tokens))
                return
            value = as_input(bridge.get_module(model, self.slots[name].caller), x, valid)
            if name in self.joined:
                inputs[name] = value
            else:
                seen(name, LayerCall(value))
                if name == last:
                    raise _Enough

        def leaving(name: str) -> Callable[..., None]:
            return lambda _cell, _inputs, output: waiting.update({name: (inputs.pop(name), _rows(output))})

        def arrived(place: str, total: ms.Tensor) -> None:
            for name in [n for n in waiting if self.joined[n] == place]:
                x, output = waiting.pop(name)
                value = _rows(total)
                seen(name, LayerCall(x, value - output if value.shape == output.shape else None))

        def _rows(value: ms.Tensor) -> Array:
            return as_input(model, value, valid)

        slots = {n: self.slots[n] for n in names}
        joined = [n for n in names if n in self.joined]
        end = self.slots[until] if until is not None else None
        with hooks() as handles, watching(model, slots, call, end, valid) as run:
            handles += [bridge.get_module(model, n).register_forward_hook(leaving(n)) for n in joined]
            with arriving(model, sorted({self.joined[n] for n in joined}), self._blocks, arrived):
                run(batch)
        for name, (x, _) in waiting.items():
            seen(name, LayerCall(x))
