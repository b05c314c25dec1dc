"""The blocks of a torch model that are a chain, each fed from memory, so that no other part of the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from slimkit.core.sparse.call_order import CallOrder
from slimkit.replay import replaying
from slimkit.sparse import memory
from slimkit.sparse.blocks import Modules, Seen, WholeModel, trace
from slimkit.sparse.inputs import BlockInputs
from slimkit.sparse.residual import first_tensor, joints
from slimkit.sparse.slots import inside
from slimkit.sparse.trained import TorchTrained

import torch


def trace_block(path: str, block: torch.nn.Module, inputs: BlockInputs, modules: Modules) -> CallOrder:
    """`trace` of one block that is fed from memory; `modules` carries whole paths."""
    return trace(block, [inputs.call(path, i) for i in range(len(inputs.valid))], inside(modules, path))[0]


class ModelBlock(WholeModel):
    """One block of a chain: it is fed from memory, so that no other part of the model runs.

    Args:
        path: the block's path, with which the paths of `modules` begin.
        inputs: what each batch gives the block; shared with the stages of the other blocks.
        feeds, traced: as for WholeModel.
        last: whether nothing reads what leaves the block.
    """

    def __init__(
        self,
        path: str,
        block: torch.nn.Module,
        dense: torch.nn.Module | None,
        inputs: BlockInputs,
        modules: Modules,
        feeds: Sequence[tuple[str, ...]],
        traced: CallOrder,
        last: bool = False,
    ) -> None:
        super().__init__(block, dense, (), inside(modules, path), feeds, traced)
        self.path, self.inputs, self._is_last = path, inputs, last
        self.changed: list[str] = []  # the parameters that training changed, once it did

    def join(self) -> None:
        """Find by one batch where outputs join the residual stream."""
        # Layers that share an input share its moments, and so can have no drift of their own.
        single = {feed[0] for feed in self.feeds if len(feed) == 1}
        alone = [p for p, (n, slot) in self.modules.items() if n in single and slot.kind != "conv2d" and not slot.read]
        if self.dense is not None and self.inputs.valid:
            with replaying(self.model) as run:
                self.joined = joints(self.model, lambda: run(self.inputs.call(self.path, 0)), alone)

    def batches(self) -> Iterator[tuple[Any, Any, torch.Tensor | None]]:
        """Each batch's call of this block."""
        for index, valid in enumerate(self.inputs.valid):
            yield self.inputs.call(self.path, index), self.inputs.call(self.path, index, dense=True), valid

    def trained(self, inherited: float = 1.0) -> TorchTrained:
        """The block, to give what the dense one does; the layers' dense inputs are not needed any more."""
        self._advance(dense=True)
        slots = [slot for _, slot in self.modules.values()]
        inputs, path = self.inputs, self.path
        if inherited < 1:
            self._put_aims(inherited)
        aim = inputs.aim if inherited < 1 else inputs.dense_hidden
        found = TorchTrained(
            self.model, slots, len(inputs.valid), partial(inputs.call, path), inputs.dense_hidden, inputs.valid, aim
        )
        self.changed = [f"{path}.{name}" for name in found.names]
        return found

    def advance(self) -> None:
        """The block's outputs become the next block's inputs."""
        if not self._is_last:
            self._advance(dense=False)
            if self.dense is not None and not self.changed:
                self._advance(dense=True)

    def _put_aims(self, inherited: float) -> None:
        """Between what the dense block makes of the sparse model's inputs and, by that share, of its own."""
        assert self.dense is not None  # a method that reconstructs is paired
        with replaying(self.dense) as run:
            for index in range(len(self.inputs.valid)):
                out = first_tensor(run(self.inputs.call(self.path, index)))
                self.inputs.put_aim(index, out + inherited * (self.inputs.dense_hidden(index) - out))

    def _advance(self, dense: bool) -> None:
        model = self.dense if dense else self.model
        assert model is not None
        with replaying(model) as run:
            for index in range(len(self.inputs.valid)):
                out = first_tensor(run(self.inputs.call(self.path, index, dense=dense)))
                self.inputs.put(index, out, dense=dense)


class LentBlock(ModelBlock):
    """A block whose dense twin is in memory only while batches pass through both.

    Args:
        lend: a context in which the twin has its weights.
        rounding: leaves in parameters, by name, what their files will hold.
        others: as for ModelBlock.
    """

    def __init__(
        self,
        lend: Callable[[], contextlib.AbstractContextManager[None]],
        rounding: Callable[[Sequence[str]], None],
        *others: Any,
    ) -> None:
        super().__init__(*others)
        self._lend, self._round = lend, rounding

    def replay(self, names: Sequence[str], seen: Seen, ended: Callable[[], None] | None = None) -> None:
        """Send every batch through, as any stage does; what they leave free is given back before layers are solved."""
        with self._lend():
            super().replay(names, seen, ended)
        memory.trim()

    def advance(self) -> None:
        """The block's outputs become the next block's inputs, with its weights as the files will hold them."""
        self._round(self.changed)
        super().advance()

    def _put_aims(self, inherited: float) -> None:
        with self._lend():
            super()._put_aims(inherited)

    def pass_on(self) -> None:
        """Send every batch through the block as it is, also through the last one."""
        self._advance(dense=False)

    def _advance(self, dense: bool) -> None:
        with self._lend() if dense else contextlib.nullcontext():
            super()._advance(dense)
