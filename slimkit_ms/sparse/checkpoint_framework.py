"""A MindSpore model whose blocks are built one at a time, filled from files, and go back to files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.batch import Call
from slimkit.core.checkpoint.weightfile import Safetensors
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse import allocate
from slimkit.core.sparse.blockfiles import BlockFiles
from slimkit.core.sparse.call_order import CallOrder
from slimkit.core.sparse.framework import CalibratedBlock
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.processes import dealt, demand_tokens, first, in_order, merged
from slimkit.core.sparse.unwalked import DatalessBlock, FinishedBlock
from slimkit_ms import bridge
from slimkit_ms.chain import valid_tokens
from slimkit_ms.replay import replaying
from slimkit_ms.sparse.blocks import as_input, trace
from slimkit_ms.sparse.chain import StoredBlock
from slimkit_ms.sparse.framework import MindSporeSparse
from slimkit_ms.sparse.slots import WeightSlot
from slimkit_ms.sparse.stored import StoredCells, StoredChain

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


class CheckpointCells(MindSporeSparse):
    """A model whose blocks are built one at a time.

    Args:
        stored: the files.
        state: where the run's own files lie.
        build: path of a block -> the block; "" -> what comes before the blocks, or None.
        blocks: the blocks' paths, first to last.
    """

    def __init__(
        self, stored: StoredCells, state: Path, build: Callable[[str], nn.Cell | None], blocks: Sequence[str]
    ) -> None:
        super().__init__(nn.Cell())
        self._stored, self._state, self._build, self._blocks = stored, state, build, list(blocks)
        self._files = BlockFiles(state)
        self._layers: dict[str, SparseLayer] = {}
        self._own: dict[str, Any] = {}
        self._at = ""  # the block that is in memory; slots lie in it
        self.keeps_masks, self.deals = False, True

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    @property
    def device(self) -> str:
        """Where blocks compute."""
        return str(ms.get_context("device_target"))

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """The layers inside the blocks, each of which is built once to be looked at."""
        found: dict[str, SparseLayer] = {}
        skipped: dict[str, str] = {}
        slots: dict[str, WeightSlot] = {}
        stem = self._build("")
        names = [] if stem is None else [own[0] for _, own in bridge.parameter_paths(stem)]
        del stem
        for path in self._blocks:
            self.model = self._made(path)
            names += [f"{path}.{own[0]}" for _, own in bridge.parameter_paths(self.model)]
            inside, left = super().layers()
            for name, layer in inside.items():
                family = f"{path}.{layer.family}" if layer.family else ""
                found[f"{path}.{name}"] = replace(layer, name=f"{path}.{name}", family=family)
                slots[f"{path}.{name}"] = self._slots[name]
            skipped |= {f"{path}.{name}": why for name, why in left.items()}
        self._stored.pair(names)
        self.model, self._slots, self._layers = nn.Cell(), slots, found
        return dict(found), skipped

    def _made(self, path: str) -> nn.Cell:
        cell = self._build(path)
        if not isinstance(cell, nn.Cell):
            raise UnsupportedError(f"build({path!r}) must return a Cell. Received: {type(cell).__name__}")
        return cell.set_train(False)

    def weight(self, name: str) -> Array:
        """The layer's weight in float32; zeros of no memory where its block is not there."""
        if not name.startswith(self._at + ".") or not self._at:
            return np.broadcast_to(np.float32(0), self._layers[name].shape)
        return super().weight(name)

    def store(self, name: str, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place as the files will hold it, and shift the bias."""
        super().store(name, weight, bias_shift)
        for whole, parameter in self._parameters([name]).items():
            self._stored.round(whole, parameter)

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Keep a layer's row of the report, to be written with its block."""
        self._own[name] = row

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember the layers of the block in memory; elsewhere nothing has to be: the source stays as it is."""
        if not self._at:
            return lambda: None
        return super().snapshot([n for n in names if n.startswith(self._at + ".")])

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """One stage a block: built, filled, made sparse, written, and let go."""
        if residual:
            raise UnsupportedError("SparseConfig.residual needs the whole cell in memory in MindSpore")
        done = int(first(self, self._files.done))
        inputs = self._capture(dataset, paired) if dataset else None
        if inputs is not None and 0 < done < len(self._blocks):
            inputs.load(self._files.activations(done))
        for index, path in enumerate(self._blocks):
            mine = [n for n in names if n.startswith(path + ".")]
            if index < done:
                yield FinishedBlock(mine, self._files.rows(index))
                continue
            with self._loaded(path) as cell:
                stage = self._stage(index, cell, mine, inputs, paired)
                yield stage
                self._write(index, stage, inputs)
                del cell, stage

    def probing(self, dataset: Iterable[Any], names: Sequence[str]) -> Iterator[CalibratedBlock]:
        """The same for a walk that only looks: nothing is written."""
        inputs = self._capture(dataset, False, "probes")
        for index, path in enumerate(self._blocks):
            with self._loaded(path) as cell:
                yield self._stage(index, cell, [n for n in names if n.startswith(path + ".")], inputs, False)

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """What an earlier run has found out; else it is made, and kept."""
        return self._files.kept(self, what, make)

    def changes(
        self, probes: Sequence[Any], names: Sequence[str], variants: Sequence[Callable[[Sequence[str]], None]]
    ) -> list[list[float]]:
        """For each batch of this process the power of what leaves the last block, and what each variant changes of it.

        What stands behind the blocks is not known here.
        """
        every = [self._capture(probes, False, f"variant{i}") for i in range(len(variants) + 1)]
        for index, path in enumerate(self._blocks):
            mine = [n for n in names if n.startswith(path + ".")]
            with self._loaded(path) as cell:
                stages = [self._stage(index, cell, mine, inputs, False) for inputs in every]
                allocate.pass_variants(self, stages, mine, variants)
        rows = []
        for index, valid in enumerate(every[0].valid):
            dense, *others = (as_input(self.model, inputs.hidden[False][index], valid) for inputs in every)
            rows.append([float((dense * dense).sum()), *(float(((o - dense) ** 2).sum()) for o in others)])
        return rows

    @contextlib.contextmanager
    def _loaded(self, path: str) -> Iterator[nn.Cell]:
        self.model, self._at = self._stored.fill(self._made(path), path), path
        try:
            yield self.model
        finally:
            self.model, self._at = nn.Cell(), ""

    def _stage(self, index: int, cell: nn.Cell, mine: list[str], inputs: StoredChain | None, paired: bool) -> Any:
        if inputs is None:
            return DatalessBlock(mine)
        path = self._blocks[index]
        dense = self._stored.fill(self._made(path), path) if paired else None
        own = {name: self._slots[name] for name in mine}
        calls = [Call(*inputs.call(path, i)) for i in range(len(inputs.valid))]
        found = trace(cell, calls, own)
        whole = {name: replace(slot, cell=f"{path}.{slot.cell}") for name, slot in own.items()}
        # Batch by batch, so that no process's share of them decides.
        by_batch = in_order(self, [[list(feed) for feed in feeds] for feeds in found.feeds_by_batch()])
        feeds = merged([[tuple(feed) for feed in one] for one in by_batch])
        last = index == len(self._blocks) - 1
        stage = StoredBlock(self._stored.round, path, cell, dense, inputs, whole, feeds, found, last)
        stage.names = mine
        return stage

    def _capture(self, dataset: Iterable[Any], paired: bool, scratch: str = "activations") -> StoredChain:
        """Send this process's batches through what comes before the blocks."""
        mine = dealt(self, dataset)
        stem = self._build("")
        if stem is not None:
            stem = self._stored.fill(self._made(""), "")
        inputs, padding = StoredChain(self._state / scratch, [i for _, i in mine], paired), CallOrder()
        for batch, _ in mine:
            if stem is None:
                args, kwargs = bridge.call_of(batch)
                output: Any = (*args, *kwargs.values())
            else:
                with replaying(stem) as run:
                    output = run(batch)
            hidden, *others = output if isinstance(output, (tuple, list)) else (output,)
            valid = valid_tokens(batch)
            padding.batch(valid is not None and not valid.any())
            inputs.add(valid, hidden, tuple(others))
        demand_tokens(self, padding)
        return inputs

    def _parameters(self, names: Sequence[str]) -> dict[str, ms.Parameter]:
        """The parameters that hold the weights and biases of layers, by their whole names."""
        found: dict[str, ms.Parameter] = {}
        for slot in (self._slots[name] for name in names):
            held = (slot.key, slot.parameter(self.model)), (slot.bias_key, slot.bias_parameter(self.model))
            found |= {f"{self._at}.{slot.cell}.{key}": value for key, value in held if value is not None}
        return found

    def finished(self) -> dict[str, Path]:
        """Where the new bytes of every changed tensor lie."""
        found: dict[str, Path] = {}
        for index in range(len(self._blocks)):
            file = self._files.weights(index)
            with Safetensors(file) as block:
                found |= dict.fromkeys(block.entries, file)
        return found

    def _write(self, index: int, stage: Any, inputs: StoredChain | None) -> None:
        """Write a block by process 0, and what enters the next by those that have it."""
        changed = self._parameters(stage.names) | dict(stage.changed)
        going = inputs if index < len(self._blocks) - 1 else None
        self._files.write(
            self,
            index,
            {n: self._own[n] for n in stage.names},
            lambda file: self._stored.save(file, changed),
            going.save if going is not None else None,
        )
