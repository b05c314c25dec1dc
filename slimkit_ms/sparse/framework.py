"""What the sparsity walk asks of a MindSpore cell; its arrays are NumPy's, for MindSpore has no triangular solve."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.sparse.allocate import changes
from slimkit.core.sparse.experts import learn_layouts
from slimkit.core.sparse.framework import CalibratedBlock
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.processes import agreed, demand_tokens
from slimkit.core.sparse.skipped import adapter_parts, other_matrices
from slimkit_ms import bridge, kinds
from slimkit_ms.chain import ChainInputs, block_paths, first_tensor, valid_tokens
from slimkit_ms.sparse.blocks import WholeModel, as_input, trace, unwatched, watching
from slimkit_ms.sparse.chain import ModelBlock
from slimkit_ms.sparse.reads import Reads
from slimkit_ms.sparse.slots import WeightSlot, own_matrices, parts, slots_of, unclear
from slimkit_ms.sparse.trained import norm_parameters

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


class MindSporeSparse:
    """A MindSpore cell behind the face that slimkit.core.sparse.compress asks for."""

    def __init__(self, model: nn.Cell) -> None:
        self.model = model
        self.keeps_masks, self.deals = True, False
        self._slots: dict[str, WeightSlot] = {}

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """Every layer that can be sparse by name, and those that cannot with the reason."""
        found: dict[str, SparseLayer] = {}
        skipped: dict[str, str] = {}
        owner: dict[tuple[int, str], str] = {}
        tables = {id(kinds.weight_of(c)) for _, c in self.model.cells_and_names() if kinds.is_kind(c, "embedding")}
        self._slots = dict(slots_of(self.model))
        adapters = adapter_parts(dict(self.model.cells_and_names()))
        for name, slot in self._slots.items():
            weight = slot.parameter(self.model)
            place = id(weight), str(slot.index)
            if slot.cell in adapters:
                skipped[name] = adapters[slot.cell]
            elif not weight.is_floating_point():
                skipped[name] = f"its weight is {weight.dtype}, which has no linear algebra"
            elif id(weight) in tables:
                skipped[name] = "its weight is tied to an embedding"
            elif place in owner:
                # Two cells on one parameter would need the inputs of both; rare in MindSpore, so left whole.
                skipped[name] = f"its weight is shared with {owner[place]!r}"
            else:
                owner[place] = name
                found[name] = slot.layer(name, self.model)
        for name in [r.split("'")[1] for r in skipped.values() if r.startswith("its weight is shared")]:
            if found.pop(name, None) is not None:
                skipped[name] = "its weight is shared with another cell"
        skipped |= unclear(self.model)
        skipped |= other_matrices(own_matrices(self.model), {*found, *skipped, *adapters, *parts(self._slots)})
        learn_layouts(found, self._slots, dataset, self._watch_products)
        return found, skipped

    def _watch_products(self, slots: Mapping[str, WeightSlot], batch: Any, turned: Callable[[str], None]) -> None:
        with watching(self.model, {}, unwatched) as run, Reads(self.model, slots, unwatched, transposed=turned):
            run(batch)

    def weight(self, name: str) -> Array:
        """The layer's weight in float32."""
        return self._slots[name].weight(self.model)

    def store(self, name: str, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place and shift the bias, in the parameters' own dtype."""
        self._slots[name].store(self.model, weight, bias_shift)

    def not_finite(self) -> list[str]:
        """The parameters that hold NaN or infinity."""
        paths = [(p, names[0]) for p, names in bridge.parameter_paths(self.model) if p.is_floating_point()]
        return [name for p, name in paths if not np.isfinite(p.astype(ms.float32).asnumpy()).all()]

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Note on the layer that its zeros were made: a delta put on it later keeps them."""
        bridge.record_zeros(bridge.get_module(self.model, self._slots[name].cell))

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember weights and biases; the function returned puts them back."""
        slots = [self._slots[name] for name in names]
        parameters = [
            p for s in slots for p in (s.parameter(self.model), s.bias_parameter(self.model)) if p is not None
        ]
        parameters += norm_parameters(self.model).values()
        kept = [(parameter, parameter.value().copy()) for parameter in {id(p): p for p in parameters}.values()]

        def restore() -> None:
            for parameter, value in kept:
                parameter.set_data(value)

        return restore

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """The parts of the cell: what comes before a chain of blocks, each block, and the rest; or the whole.

        With `residual` it is the whole, in which alone it is known where the stream runs.
        """
        slots = {name: self._slots[name] for name in names}
        dense = copy.deepcopy(self.model) if paired else None
        blocks = [] if residual else block_paths(self.model, slots)
        inputs = ChainInputs(blocks)
        calls = trace(self.model, inputs.note(self.model, dataset), slots, blocks)
        demand_tokens(self, calls)
        every = agreed(self, calls.feeds)
        if not all(self.gather(inputs.chained)):
            del inputs
            yield WholeModel(self.model, dense, dataset, slots, every, calls)
            return
        where = {name: next((b for b in blocks if name.startswith(b + ".")), "") for name in names}
        first = next(i for i, feed in enumerate(every) if where[feed[0]])
        before = [f for f in every[:first] if not where[f[0]]]
        after = [f for f in every[first:] if not where[f[0]]]
        if dense is not None:
            inputs.pair()
        if before:
            yield WholeModel(self.model, dense, dataset, slots, before, calls, whole=False)
            inputs.capture(self.model, dataset)
        if not after:  # nobody asks what leaves the last block with layers to do
            blocks = blocks[: 1 + max(blocks.index(where[f[0]]) for f in every if where[f[0]])]
        for block in blocks:
            feeds = [f for f in every if where[f[0]] == block]
            cell, last = bridge.get_module(self.model, block), block == blocks[-1]
            twin = bridge.get_module(dense, block) if dense is not None else None
            yield ModelBlock(block, cell, twin, inputs, slots, feeds, calls, last)
        del inputs
        if after:
            yield WholeModel(self.model, dense, dataset, slots, after, calls, whole=False)

    def probing(self, dataset: Iterable[Any], names: Sequence[str]) -> Iterator[CalibratedBlock]:
        """The same parts for a walk that only looks."""
        return self.stages(dataset, names, paired=False)

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """A value that is made anew: nothing is left of earlier runs."""
        return make()

    def changes(
        self, probes: Sequence[Any], names: Sequence[str], variants: Sequence[Callable[[Sequence[str]], None]]
    ) -> list[list[float]]:
        """For each batch the power of the model's output, and what each variant changes of it."""
        return changes(self, probes, names, variants)

    def outputs(self, batch: Any) -> Array:
        """The cell's first output for a batch, as a float32 NumPy array."""
        with watching(self.model, {}, unwatched) as run:
            output = run(batch)
        return as_input(self.model, first_tensor(output), valid_tokens(batch))

    def processes(self) -> int:
        """How many processes of mindspore.communication share the calibration data."""
        from mindspore.communication import GlobalComm, get_group_size

        return get_group_size() if GlobalComm.INITED else 1

    def rank(self) -> int:
        """The number of this process of mindspore.communication, from 0."""
        from mindspore.communication import get_rank

        return get_rank() if self.processes() > 1 else 0

    def gather(self, value: Any) -> list[Any]:
        """A plain JSON value of every process of mindspore.communication, by its number."""
        if self.processes() < 2:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        return [json.loads(own.tobytes()) for own in _every(text)]

    def reduce(self, arrays: Sequence[Array]) -> list[Array]:
        """Sums over all processes of mindspore.communication, when it runs."""
        if self.processes() < 2:
            return list(arrays)
        # AllReduce knows float32 alone; other numbers go as they are, and are added here in the processes' order.
        return [
            _all_reduce(array)
            if array.dtype == np.float32
            else np.sum(_all_gather(array), axis=0, dtype=array.dtype).reshape(array.shape)
            for array in arrays
        ]

    def spread(self, array: Array, owner: int) -> Array:
        """What the process with that number has, in all: the others hand in an array of its shape and type."""
        return _all_gather(array)[owner].reshape(array.shape)

    def swap(self, sent: Array, gives: Sequence[int], gets: Sequence[int]) -> Array:
        """Give every process its part of a flat array, and get as many numbers of each, in the processes' order."""
        # MindSpore's exchange of parts has no kernel for the CPU: all get everything, and keep what is theirs.
        every = self.gather(list(gives))
        rank = self.rank()
        found = [
            whole[sum(parts[:rank]) : sum(parts[: rank + 1])]
            for whole, parts in zip(_every(np.ascontiguousarray(sent)), every)
        ]
        return np.concatenate(found)


def _all_reduce(values: Array) -> Array:
    from mindspore import ops

    total: Array = bridge.as_numpy(ops.AllReduce()(ms.Tensor(np.ascontiguousarray(values, np.float32))))
    return total


def _all_gather(values: Array) -> Array:
    """(processes, n) what each process has of n numbers, bit by bit; there are as many in each."""
    from mindspore import ops

    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    words = np.zeros(max(1, -(-raw.size // 4)), np.int32)  # the whole numbers that it knows
    words.view(np.uint8)[: raw.size] = raw
    every: Array = bridge.as_numpy(ops.AllGather()(ms.Tensor(words))).reshape(-1, words.size)
    found: Array = np.stack([np.ascontiguousarray(row).view(np.uint8)[: raw.size] for row in every])
    return found.view(values.dtype)


def _every(values: Array) -> list[Array]:
    """What each process has, of lengths of their own, bit by bit."""
    sizes = _all_gather(np.array([values.size], np.int32))[:, 0]
    padded = np.zeros(int(sizes.max()), values.dtype)
    padded[: values.size] = values
    return [row[:size] for row, size in zip(_all_gather(padded), sizes)]
