"""The blocks of a MindSpore cell that are a chain, each fed from memory, so that no other part of the cell runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from slimkit.core import replay
from slimkit.core.batch import Call
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse.call_order import CallOrder
from slimkit_ms import bridge
from slimkit_ms.replay import TENSORS, replaying, state_of
from slimkit_ms.sparse.blocks import WholeModel, valid_tokens
from slimkit_ms.sparse.residual import first_tensor, hooks
from slimkit_ms.sparse.slots import WeightSlot
from slimkit_ms.sparse.trained import MindSporeTrained

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


class _Hidden:
    """Stands where a call takes the hidden states; copies leave it as it is."""


_HIDDEN = _Hidden()


class ChainInputs:
    """What every batch gives every block: hidden states, which move on, and the other arguments, which stay.

    Args:
        blocks: the blocks' paths.

    Attributes:
        chained: whether each block's first input is the output of the block before, in every batch so far, and all else
            that it reads was there before the batch or is among its arguments.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self.valid: list[Array | None] = []
        self.hidden: dict[bool, list[Any]] = {False: [], True: []}
        self.chained = len(blocks) > 1
        self._blocks = blocks
        self._others: list[dict[str, tuple[Any, Any]]] = []
        self._dense_others: list[dict[str, tuple[Any, Any]]] = []

    def note(self, model: nn.Cell, dataset: Iterable[Any]) -> Iterator[Any]:
        """Each batch, while what it gives the blocks is noted; whoever takes it sends it through the cell."""
        outputs: dict[str, Any] = {}
        states: dict[str, Any] = {}

        def began(path: str) -> Callable[..., None]:
            return lambda _cell, args, kwargs: self._began(path, args, kwargs, outputs, states)

        def left(path: str) -> Callable[..., None]:
            return lambda _cell, _inputs, output: outputs.update({path: first_tensor(output)})

        def remember() -> None:
            states.update({path: state_of(bridge.get_module(model, path)) for path in self._blocks})

        for batch in dataset:
            self.valid.append(valid_tokens(batch))
            self._others.append({})
            outputs.clear()
            with hooks() as handles:
                if self.chained:  # as the forward begins: a hook that is put on a cell changes it, too
                    handles.append(model.register_forward_pre_hook(lambda *_: remember()))
                for path in self._blocks if self.chained else ():
                    cell = bridge.get_module(model, path)
                    handles.append(cell.register_forward_pre_hook(began(path), with_kwargs=True))
                    handles.append(cell.register_forward_hook(left(path)))
                yield batch
            self.chained = self.chained and len(self._others[-1]) == len(self._blocks)

    def _began(self, path: str, args: Any, kwargs: Any, outputs: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        place = self._blocks.index(path)
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        before = outputs.get(self._blocks[place - 1]) if place else x
        # Hooks may be handed another object for the same tensor, so its values decide.
        same = isinstance(x, ms.Tensor) and before is not None and before.shape == x.shape and bool((before == x).all())
        if path in self._others[-1] or not same or states[path].differs():
            self.chained = False
        if not self.chained:
            return
        if not place:
            self.hidden[False].append(x.copy())
        blank = {k: _HIDDEN if v is x else v for k, v in kwargs.items()}
        self._others[-1][path] = replay.fresh((tuple(_HIDDEN if a is x else a for a in args), blank), TENSORS)

    def call(self, path: str, index: int, dense: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One batch's call of a block."""
        args, kwargs = (self._dense_others if dense else self._others)[index][path]
        hidden = self.hidden[dense][index]
        return (
            tuple(hidden if a is _HIDDEN else a for a in args),
            {k: hidden if v is _HIDDEN else v for k, v in kwargs.items()},
        )

    def pair(self) -> None:
        """Keep what was noted for the dense model too."""
        self._dense_others, self.hidden[True] = self._others, list(self.hidden[False])

    def capture(self, model: nn.Cell, dataset: Iterable[Any]) -> None:
        """Note anew how the model calls its blocks: layers before them have changed."""
        self.valid, self._others, self.hidden[False] = [], [], []
        with replaying(model) as run:
            for batch in self.note(model, dataset):
                run(batch)
        if not self.chained:
            raise UnsupportedError("model must run its blocks as a chain, as it did before its first layers changed")


class ModelBlock(WholeModel):
    """One block of a chain.

    Args:
        path: the block's path, with which the layers' names begin.
        block: the block.
        dense: its dense twin, or None.
        inputs: what each batch gives the block; shared with the stages of the other blocks.
        slots: where the layers' weights lie in the whole cell.
        feeds: layers in the order they are called; those that share an input together.
        traced: what a forward taught of the order of calls.
        last: whether nothing reads what leaves the block.
    """

    def __init__(
        self,
        path: str,
        block: nn.Cell,
        dense: nn.Cell | None,
        inputs: ChainInputs,
        slots: Mapping[str, WeightSlot],
        feeds: Sequence[tuple[str, ...]],
        traced: CallOrder,
        last: bool,
    ) -> None:
        start = path + "."
        own = {n: replace(s, cell=s.cell[len(start) :]) for n, s in slots.items() if n.startswith(start)}
        super().__init__(block, dense, (), own, feeds, traced)
        self._path, self._inputs, self._is_last = path, inputs, last
        self._trained = False

    def batches(self) -> Iterator[tuple[Any, Any, Array | None]]:
        """Each batch's call of this block."""
        for index, valid in enumerate(self._inputs.valid):
            dense = Call(*self._inputs.call(self._path, index, dense=True)) if self.dense is not None else None
            yield Call(*self._inputs.call(self._path, index)), dense, valid

    def trained(self, inherited: float = 1.0) -> MindSporeTrained:
        """The block, to give what the dense one does; the layers' dense inputs are not needed any more."""
        self._advance(dense=True)
        self._trained = True
        inputs, path = self._inputs, self._path

        def target(index: int) -> Array:
            return bridge.as_numpy(inputs.hidden[True][index].astype(ms.float32))

        aim = None if inherited == 1 else self._aims(inherited, target).__getitem__
        slots, n = list(self.slots.values()), len(inputs.valid)
        return MindSporeTrained(self.model, slots, n, partial(inputs.call, path), target, inputs.valid, aim)

    def advance(self) -> None:
        """The block's outputs become the next block's inputs."""
        if not self._is_last:
            self._advance(dense=False)
            if self.dense is not None and not self._trained:
                self._advance(dense=True)

    def _aims(self, inherited: float, target: Callable[[int], Array]) -> list[Array]:
        """Between what the dense block makes of the sparse model's inputs and, by that share, of its own."""
        assert self.dense is not None  # a method that reconstructs is paired
        found = []
        with replaying(self.dense) as run:
            for index in range(len(self._inputs.valid)):
                out = first_tensor(run(Call(*self._inputs.call(self._path, index))))
                out = bridge.as_numpy(out.astype(ms.float32))
                found.append(out + np.float32(inherited) * (target(index) - out))
        return found

    def _advance(self, dense: bool) -> None:
        model = self.dense if dense else self.model
        assert model is not None
        with replaying(model) as run:
            for index in range(len(self._inputs.valid)):
                out = first_tensor(run(Call(*self._inputs.call(self._path, index, dense=dense))))
                self._inputs.hidden[dense][index] = out
