"""The blocks of a MindSpore cell that are a chain, each fed from memory, so that no other part of the cell runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from slimkit.core.batch import Call
from slimkit.core.sparse.call_order import CallOrder
from slimkit_ms import bridge
from slimkit_ms.chain import ChainInputs, first_tensor
from slimkit_ms.replay import replaying
from slimkit_ms.sparse.blocks import WholeModel
from slimkit_ms.sparse.slots import WeightSlot
from slimkit_ms.sparse.trained import MindSporeTrained

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


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
        self.changed: dict[str, ms.Parameter] = {}  # the parameters that training changed by whole names, once it did

    def batches(self) -> Iterator[tuple[Any, Any, Array | None]]:
        """Each batch's call of this block."""
        for index, valid in enumerate(self._inputs.valid):
            dense = Call(*self._inputs.call(self._path, index, dense=True)) if self.dense is not None else None
            yield Call(*self._inputs.call(self._path, index)), dense, valid

    def trained(self, inherited: float = 1.0) -> MindSporeTrained:
        """The block, to give what the dense one does; the layers' dense inputs are not needed any more."""
        self._advance(dense=True)
        inputs, path = self._inputs, self._path

        def target(index: int) -> Array:
            return bridge.as_numpy(inputs.hidden[True][index].astype(ms.float32))

        def aim(index: int) -> Array:
            return bridge.as_numpy(inputs.aims[index])

        if inherited < 1:
            self._put_aims(inherited, target)
        slots, n = list(self.slots.values()), len(inputs.valid)
        call = partial(inputs.call, path)
        found = MindSporeTrained(self.model, slots, n, call, target, inputs.valid, aim if inherited < 1 else None)
        self.changed = {f"{path}.{name}": parameter for name, parameter in found.parameters.items()}
        return found

    def advance(self) -> None:
        """The block's outputs become the next block's inputs."""
        if not self._is_last:
            self._advance(dense=False)
            if self.dense is not None and not self.changed:
                self._advance(dense=True)

    def _put_aims(self, inherited: float, target: Callable[[int], Array]) -> None:
        """Between what the dense block makes of the sparse model's inputs and, by that share, of its own."""
        assert self.dense is not None  # a method that reconstructs is paired
        with replaying(self.dense) as run:
            for index in range(len(self._inputs.valid)):
                out = first_tensor(run(Call(*self._inputs.call(self._path, index))))
                out = bridge.as_numpy(out.astype(ms.float32))
                self._inputs.aims[index] = ms.Tensor(out + np.float32(inherited) * (target(index) - out))

    def _advance(self, dense: bool) -> None:
        model = self.dense if dense else self.model
        assert model is not None
        with replaying(model) as run:
            for index in range(len(self._inputs.valid)):
                out = first_tensor(run(Call(*self._inputs.call(self._path, index, dense=dense))))
                self._inputs.hidden[dense][index] = out


class StoredBlock(ModelBlock):
    """A block whose parameters go to files.

    Args:
        rounding: leaves in a parameter, by its whole name, what its file will hold.
        others: as for ModelBlock.
    """

    def __init__(self, rounding: Callable[[str, ms.Parameter], None], *others: Any) -> None:
        super().__init__(*others)
        self._round = rounding

    def advance(self) -> None:
        """The block's outputs become the next block's inputs, with its weights as the files will hold them."""
        for name, parameter in self.changed.items():
            self._round(name, parameter)
        super().advance()

    def pass_on(self) -> None:
        """Send every batch through the block as it is, also through the last one."""
        self._advance(dense=False)
