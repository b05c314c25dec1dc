"""A MindSpore cell that is a chain of blocks: batches go through one block at a time, fed from memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import replay
from slimkit.core.errors import UnsupportedError
from slimkit_ms import bridge
from slimkit_ms.replay import TENSORS, replaying, state_of

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def first_tensor(value: Any) -> Any:
    """The hidden states in a block's output: itself, or the first of a tuple."""
    return value[0] if isinstance(value, (tuple, list)) else value


def block_paths(model: nn.Cell, names: Collection[str]) -> list[str]:
    """The children of the list that holds most of the layers, if they are two or more of one class; else none."""
    best: list[str] = []
    covered = 0
    for path, cell in model.cells_and_names():
        if isinstance(cell, (nn.CellList, nn.SequentialCell)) and len(cell) > 1 and len({type(c) for c in cell}) == 1:
            stem = f"{path}." if path else ""
            # Inside a child, not the child itself: a list of plain layers is no chain of blocks.
            inside = [n for n in names if n.startswith(stem) and "." in n[len(stem) :]]
            if len(inside) > covered:
                best, covered = [f"{stem}{i}" for i in range(len(cell))], len(inside)
    return best


@contextlib.contextmanager
def hooks() -> Iterator[list[Any]]:
    """A list of handles of hooks, which are removed at the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def valid_tokens(batch: Any) -> Array | None:
    """Which tokens of a batch are no padding: its 2-D attention mask of zeros and ones, if it has one."""
    mask = bridge.tensors(batch.get("attention_mask")) if isinstance(batch, Mapping) else None
    if not isinstance(mask, ms.Tensor) or mask.ndim != 2:
        return None
    found: Array = bridge.as_numpy(mask) != 0
    return found


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
        aims: number -> what training draws a block's output to.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        self.aims: Any = {}
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
