"""Repair of a pruned MindSpore cell from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.batch import Call
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import SAME, RepairStage, parted, repair
from slimkit_ms import bridge, kinds
from slimkit_ms.chain import ChainInputs, block_paths, first_tensor, hooks
from slimkit_ms.replay import replaying
from slimkit_ms.signals import input_rows, output_rows, padding_of, real_rows, unsuited

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def compensate(
    dense: nn.Cell, pruned: nn.Cell, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float | None
) -> dict[str, Any]:
    """Refit every ordinary 2-d convolution and dense layer of a pruned cell to its original's outputs, in place.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.repair`.

    Returns:
        What `slimkit.core.prune.refit.repair` reports.
    """
    return repair(MindSporeRepair(dense, pruned, data), layers, plan, damping)


class MindSporeRepair:
    """A cell before and after its cut, as compensation sees it.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell, data: Iterable[Any]) -> None:
        self._dense, self._pruned, self._data = dense, pruned, data
        self._tied = {p: paths for _, paths in bridge.parameter_paths(pruned) if len(paths) > 1 for p in paths}

    def unsuited(self, path: str) -> str | None:
        if f"{path}.weight" in self._tied:
            # Fitted as a layer it would change what it is elsewhere.
            return f"its weight is {next(p for p in self._tied[f'{path}.weight'] if p != f'{path}.weight')} too"
        return unsuited(bridge.get_module(self._pruned, path))

    def made_axis(self, path: str) -> int:
        return 0

    def values(self, path: str) -> tuple[Array, Array | None]:
        cell = bridge.get_module(self._pruned, path)
        weight, bias = kinds.weight_of(cell), kinds.bias_of(cell)
        return _numbers(weight).reshape(len(weight), -1), None if bias is None else _numbers(bias)

    def stages(self, layers: Sequence[str], behind: Collection[str]) -> Iterator[RepairStage]:
        batches = list(self._data)
        blocks = block_paths(self._dense, layers)
        if not is_chain(self._dense, blocks, batches[:1]) or not is_chain(self._pruned, blocks, batches[:1]):
            blocks = []
        before, inside, after = parted(layers, blocks, behind)
        if before:
            yield WholePair(self._dense, self._pruned, before, batches)
        pair = ChainPair(self._dense, self._pruned, blocks, batches) if any(inside) else None
        for number, (own, further) in enumerate(zip(inside, after)):
            if pair is not None:
                yield BlockPair(pair, number, own)
                pair.advance(1, number)
            if further:
                yield WholePair(self._dense, self._pruned, further, batches)

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        cell = bridge.get_module(self._pruned, path)
        _put(kinds.weight_of(cell), weight)
        if bias is not None:
            held = kinds.bias_of(cell)
            assert held is not None
            _put(held, bias)


class WholePair:
    """Both cells whole: every layer costs a forward of each.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        layers: paths in the order they run.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell, layers: Sequence[str], data: Iterable[Any]) -> None:
        self._dense, self._pruned, self.layers, self._data = dense, pruned, list(layers), data

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        cell = bridge.get_module(self._pruned, path)
        before: dict[str, list[tuple[Array, Array]]] = {}
        after: dict[str, list[tuple[Array, Array]]] = {}
        with replaying(self._dense) as run_dense, replaying(self._pruned) as run_pruned:
            for batch in self._data:
                with _noting(self._dense, [path], before):
                    run_dense(batch)
                with _noting(self._pruned, [path], after):
                    run_pruned(batch)
                padding = padding_of(self._pruned, batch)
                for (_, wanted), (given, _) in zip(before.pop(path, []), after.pop(path, [])):
                    given, wanted = (real_rows(padding, path, x) for x in (given, wanted))
                    yield input_rows(cell, given), output_rows(cell, wanted)


def is_chain(model: nn.Cell, blocks: Sequence[str], batches: Sequence[Any]) -> bool:
    """Whether each block is fed by the one before it and reads nothing else that a forward makes."""
    inputs = ChainInputs(blocks)
    with replaying(model) as run:
        for batch in inputs.note(model, batches if inputs.chained else ()):
            run(batch)
    return inputs.chained


class ChainPair:
    """Both cells as chains of the same blocks, and what every batch gives each block.

    Args:
        dense: the cell before the cut.
        pruned: the cell after it.
        blocks: the blocks' paths.
        data: calibration batches.
    """

    def __init__(self, dense: nn.Cell, pruned: nn.Cell, blocks: Sequence[str], data: Sequence[Any]) -> None:
        self.cells, self.blocks, self.data = (dense, pruned), blocks, data
        self.inputs = ChainInputs(blocks), ChainInputs(blocks)
        for cell, inputs in zip(self.cells, self.inputs):
            inputs.capture(cell, data)

    def hidden(self, which: int) -> list[Any]:
        """What each batch gives the block that is next."""
        return self.inputs[which].hidden[False]

    def sent(self, which: int, number: int) -> Iterator[ms.Tensor]:
        """What leaves a block for each batch in turn."""
        path = self.blocks[number]
        with replaying(bridge.get_module(self.cells[which], path)) as run:
            for index in range(len(self.data)):
                yield first_tensor(run(Call(*self.inputs[which].call(path, index))))

    def advance(self, which: int, number: int) -> None:
        """What leaves a block becomes what enters the next one."""
        for index, output in enumerate(self.sent(which, number)):
            self.hidden(which)[index] = output

    def joins(self, number: int, layer: nn.Cell) -> bool:
        """Whether a layer's output is added to what else leaves its block."""
        calm = _single(next(self.sent(1, number)))
        noise = np.random.default_rng(0).standard_normal(calm.shape) * calm.std()

        def disturbed(_cell: nn.Cell, _inputs: Any, output: ms.Tensor) -> ms.Tensor:
            return output + ms.Tensor(noise).astype(output.dtype) if output.shape == noise.shape else output

        with hooks() as handles:
            handles.append(layer.register_forward_hook(disturbed))
            moved = _single(next(self.sent(1, number)))
        return bool(np.linalg.norm(moved - calm - noise) < SAME * np.linalg.norm(noise))

    def norms(self, number: int) -> list[str]:
        """The norms of a block."""
        block = self.blocks[number]
        inside = bridge.get_module(self.cells[1], block).cells_and_names()
        return [f"{block}.{name}" for name, cell in inside if name and kinds.is_norm(cell)]

    def meets(self, number: int, path: str) -> str:
        """The norm that is given a layer's output added to something, as blocks have it whose norms come last; "" for
        none."""
        norms, noises = self.norms(number), list[Array]()

        def disturbed(_cell: nn.Cell, _inputs: Any, output: ms.Tensor) -> ms.Tensor:
            noises.append(np.random.default_rng(0).standard_normal(output.shape) * _single(output).std())
            return output + ms.Tensor(noises[-1]).astype(output.dtype)

        seen: tuple[dict[str, list[tuple[Array, Array]]], ...] = ({}, {})
        with _noting(self.cells[1], norms, seen[0]):
            next(self.sent(1, number))
        with hooks() as handles, _noting(self.cells[1], norms, seen[1]):
            handles.append(bridge.get_module(self.cells[1], path).register_forward_hook(disturbed))
            next(self.sent(1, number))
        for norm in norms if len(noises) == 1 else ():
            before, after = ([given for given, _ in told.get(norm, [])] for told in seen)
            one = len(before) == len(after) == 1 and before[0].shape == noises[0].shape
            if one and np.linalg.norm(after[0] - before[0] - noises[0]) < SAME * np.linalg.norm(noises[0]):
                return norm
        return ""


class BlockPair:
    """One block before and after the cut: the dense one runs once, the cut one once for each layer.

    The last layer, where its output joins the residual stream, is asked to make up as well for what the stream has lost
    before it. In a block whose norms come last every layer whose output a norm is given, added to the stream, does.

    Args:
        pair: both cells.
        number: of the block.
        layers: of this block.
    """

    def __init__(self, pair: ChainPair, number: int, layers: Sequence[str]) -> None:
        self._pair, self._number, self.layers = pair, number, list(layers)
        self._wanted: dict[tuple[str, int], list[Array]] = {}
        self._normed: dict[tuple[str, int], list[Array]] = {}
        # Where the stream goes through norms inside the block, what goes into them is the stream.
        last = bridge.get_module(pair.cells[1], self.layers[-1]) if self.layers else None
        self._joins = last is not None and pair.joins(number, last)
        norms = [] if self._joins or last is None else pair.norms(number)
        seen: dict[str, list[tuple[Array, Array]]] = {}
        with _noting(pair.cells[0], [*self.layers, *norms], seen):
            for index, output in enumerate(pair.sent(0, number)):
                for path in self.layers:
                    self._wanted[path, index] = [said for _, said in seen.get(path, [])]
                for path in norms:
                    self._normed[path, index] = [given for given, _ in seen.get(path, [])]
                seen.clear()
                pair.hidden(0)[index] = output

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        pair, cell = self._pair, bridge.get_module(self._pair.cells[1], path)
        whole = path == self.layers[-1] and self._joins
        norm = "" if self._joins or kinds.is_kind(cell, "conv") else pair.meets(self._number, path)
        seen: dict[str, list[tuple[Array, Array]]] = {}
        with _noting(pair.cells[1], [path, norm] if norm else [path], seen):
            for index, output in enumerate(pair.sent(1, self._number)):
                full, now = self._normed.get((norm, index), []), seen.pop(norm, [])
                calls, wanted = seen.pop(path, []), self._wanted.pop((path, index), [])
                before, left = _single(pair.hidden(0)[index]), _single(output)
                # Not where the stream itself was cut: its lost features are wanted nowhere.
                if whole and before.shape == left.shape and len(calls) == 1 and calls[0][1].shape == left.shape:
                    wanted = [before - left + calls[0][1]]
                if len(calls) == len(full) == len(now) == 1 and full[0].shape == now[0][0].shape == calls[0][1].shape:
                    wanted = [full[0] - now[0][0] + calls[0][1]]
                padding = padding_of(pair.cells[1], pair.data[index])
                for (given, _), said in zip(calls, wanted):
                    yield (
                        input_rows(cell, real_rows(padding, path, given)),
                        output_rows(cell, real_rows(padding, path, said)),
                    )


@contextlib.contextmanager
def _noting(model: nn.Cell, paths: Sequence[str], seen: dict[str, list[tuple[Array, Array]]]) -> Iterator[None]:
    """Note input and output of some layers at each of their calls."""

    def note(path: str, inputs: Any, output: Any) -> None:
        seen.setdefault(path, []).append((_single(inputs[0]), _single(output)))

    cells: Mapping[str, nn.Cell] = {path: bridge.get_module(model, path) for path in paths}
    with bridge.hooked(cells, note):
        yield


def _single(tensor: ms.Tensor) -> Array:
    # By way of float32: bfloat16 tensors give no array.
    found: Array = tensor.astype(ms.float32).asnumpy()
    return found


def _numbers(tensor: ms.Tensor) -> Array:
    return _single(tensor).astype(np.float64)


def _put(parameter: ms.Parameter, values: Array) -> None:
    whole = np.ascontiguousarray(values.reshape(parameter.shape), dtype=np.float32)
    parameter.set_data(ms.Tensor(whole).astype(parameter.dtype))
