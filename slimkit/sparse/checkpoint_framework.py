"""A model whose blocks come from a checkpoint's files one by one, and go back to files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slimkit.core import batch as batches
from slimkit.core import files
from slimkit.core.checkpoint import shards
from slimkit.core.errors import UnsupportedError
from slimkit.core.sparse import allocate
from slimkit.core.sparse.blockfiles import BlockFiles
from slimkit.core.sparse.call_order import CallOrder
from slimkit.core.sparse.framework import CalibratedBlock
from slimkit.core.sparse.processes import dealt, demand_tokens, first, in_order, merged
from slimkit.core.sparse.unwalked import DatalessBlock, FinishedBlock
from slimkit.sparse import memory, stored_outputs
from slimkit.sparse.chain import LentBlock, trace_block
from slimkit.sparse.framework import TorchSparse, block_paths
from slimkit.sparse.inputs import valid_tokens
from slimkit.sparse.stored_blocks import StoredBlocks
from slimkit.sparse.stored_inputs import StoredInputs
from slimkit.stored import StoredModel, stored_dtype, to_meta, write_tensors

import torch


class CheckpointSparse(TorchSparse):
    """A model whose blocks come from files one by one, and go back to files.

    Args:
        source: the folder.
        state: where the run's own files lie.
        places: where each tensor's bytes lie.
        names: parameter name -> tensor name, or None.
        compute: what floats are computed in, or None: as they are stored. Solved weights are rounded to what is stored
            at once, so that later layers see what the files will hold.
        device: where blocks compute.
        offload: where activations lie between blocks: "cpu", in main memory, or "disk".
    """

    def __init__(
        self,
        source: Path,
        state: Path,
        places: dict[str, shards.Place],
        names: Callable[[str], str] | None,
        compute: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        offload: str = "disk",
    ) -> None:
        self._stored = StoredModel(source, names, compute, places)
        super().__init__(self._stored.model)
        self._device, self._offload = torch.device(device), offload
        self._loader = StoredBlocks(self._stored, self._device, state / f"dense-{self.rank()}")
        self._state, self._files = state, BlockFiles(state)
        self._blocks: list[str] = []
        self._own: dict[str, Any] = {}
        self._changed: set[str] = set()  # parameters of the block in work that are no longer what the files hold
        self._paired = False  # whether those are still needed as they were
        self.keeps_masks, self.deals = False, True

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        """The layers inside the blocks; those outside are listed as left alone."""
        found, skipped = super().layers()  # no weight is in memory that a batch could go through
        self._blocks = block_paths(self.model, {n: (n, None) for n in found})
        if not self._blocks:
            raise UnsupportedError(
                f"src must be a model with a list of equal blocks. Received: {type(self.model).__name__}"
            )
        for name in list(found):
            if not name.startswith(tuple(b + "." for b in self._blocks)):
                skipped[name] = "outside the blocks"
                del found[name]
        self._layers = found
        return dict(found), skipped

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        if not self._blocks:
            self.layers()
        return len(self._blocks)

    def largest_bytes(self) -> int:
        """The size of the largest matrix in a block, as it is computed in."""
        if not self._blocks:
            self.layers()
        width = {n: self.weight(n).itemsize for n in self._layers}
        own = self._stored.compute.itemsize if self._stored.compute is not None else 0
        return max((layer.size * max(own, width[n]) for n, layer in self._layers.items()), default=0)

    @property
    def device(self) -> str:
        """Where blocks compute."""
        return str(self._device)

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember the layers of the block in memory; elsewhere nothing has to be: the source stays as it is."""
        return super().snapshot([n for n in names if not self.weight(n).is_meta])

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """One stage a block: loaded, made sparse, written, and let go."""
        done = int(first(self, self._files.done))
        inputs = self._captured(dataset, paired, "activations")[0] if dataset else None
        if inputs is not None and 0 < done < len(self._blocks):
            inputs.load(self._files.activations(done))
        for index, path in enumerate(self._blocks):
            mine = [n for n in names if n.startswith(path + ".")]
            if index < done:
                yield FinishedBlock(mine, self._files.rows(index))
                continue
            with self._loaded(index) as block:
                stage = self._stage(index, block, mine, inputs, paired)
                yield stage
                self._write(index, stage, inputs)
                del block, stage
        self._loader.close()

    def probing(self, dataset: Iterable[Any], names: Sequence[str]) -> Iterator[CalibratedBlock]:
        """The same for a walk that only looks: nothing is written."""
        inputs = self._captured(dataset, False, "probes")[0]
        for index, path in enumerate(self._blocks):
            with self._loaded(index) as block:
                yield self._stage(index, block, [n for n in names if n.startswith(path + ".")], inputs, False)
        self._loader.close()

    @contextlib.contextmanager
    def _loaded(self, index: int) -> Iterator[torch.nn.Module]:
        path = self._blocks[index]
        following = self._blocks[index + 1] if index + 1 < len(self._blocks) else None
        block = self._loader.load(path, following)
        self._changed.clear()
        yield block
        self._loader.release(path)
        memory.trim()

    def _stage(
        self, index: int, block: torch.nn.Module, mine: list[str], inputs: StoredInputs | None, paired: bool
    ) -> Any:
        if inputs is None:
            return DatalessBlock(mine)
        path, modules = self._blocks[index], {n: (n, self._slots[n]) for n in mine}
        dense = self._loader.twin(block) if paired else None
        self._paired = paired
        found = trace_block(path, block, inputs, modules)
        # Batch by batch, so that no process's share of them decides.
        every = in_order(self, [[list(feed) for feed in feeds] for feeds in found.feeds_by_batch()])
        feeds = merged([[tuple(feed) for feed in one] for one in every])
        lend = partial(self._loader.lent, path, block, dense, self._changed)
        last = index == len(self._blocks) - 1
        stage = LentBlock(lend, self._round, path, block, dense, inputs, modules, feeds, found, last)
        stage.names = mine
        return stage

    def store(self, name: str, weight: torch.Tensor, bias_shift: torch.Tensor | None) -> None:
        """Put a weight in place and shift the bias."""
        changed = self._parameters([name])
        for parameter in changed if self._paired else ():
            if parameter not in self._changed:
                self._loader.keep(parameter)
        self._changed.update(changed)
        super().store(name, weight, bias_shift)
        self._round(changed)

    def _round(self, parameters: Iterable[str]) -> None:
        """Leave in parameters what their files will hold, in place."""
        for name in parameters if self._stored.compute is not None else ():
            value = self.model.get_parameter(name).detach()
            value.copy_(value.to(stored_dtype(self._stored.places[self._stored.keys(name)[0]])))

    def finished(self) -> dict[str, shards.Place]:
        """Where the new bytes of every changed tensor lie."""
        found: dict[str, shards.Place] = {}
        for index in range(len(self._blocks)):
            found |= shards.header(self._files.weights(index))
        return found

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Keep a layer's row of the report, to be written with its block."""
        self._own[name] = row

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """What an earlier run has found out; else it is made, and kept."""
        return self._files.kept(self, what, make)

    def changes(
        self, probes: Sequence[Any], names: Sequence[str], variants: Sequence[Callable[[Sequence[str]], None]]
    ) -> list[list[float]]:
        """For each batch of this process the power of the model's output, and what each variant changes of it."""
        inputs = self._captured(probes, False, *(f"variant{i}" for i in range(len(variants) + 1)))
        for index, path in enumerate(self._blocks):
            mine = [n for n in names if n.startswith(path + ".")]
            with self._loaded(index) as block:
                stages = [self._stage(index, block, mine, one, False) for one in inputs]
                allocate.pass_variants(self, stages, mine, variants)
        self._loader.close()
        own = [batch for batch, _ in dealt(self, probes)]
        with self._outside(whole=True):
            return stored_outputs.changes(self.model, own, inputs, self._blocks)

    @contextlib.contextmanager
    def _outside(self, whole: bool = False) -> Iterator[None]:
        """Have the weights outside the blocks in main memory: those before them, or all."""
        inside = tuple(b + "." for b in self._blocks)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        late = {id(p) for p in head.parameters()} if head is not None and not whole else set()
        table = self.model.get_input_embeddings().weight
        outside = []
        for name, parameter in self.model.named_parameters():
            if not name.startswith(inside) and (id(parameter) not in late or parameter is table):
                with contextlib.suppress(UnsupportedError):  # a fresh head has no weights, and runs after the blocks
                    self._stored.keys(name)
                    outside.append(name)
        self.model.load_state_dict(self._stored.read(outside), strict=False, assign=True)
        if whole:  # a tied head has no tensor of its own
            self.model.tie_weights()
        try:
            yield
        finally:
            to_meta(self.model, outside)
            if whole:
                self.model.tie_weights()

    def _captured(self, dataset: Iterable[Any], paired: bool, *scratch: str) -> list[StoredInputs]:
        """Run what comes before the blocks and note how each block is called, once for each folder of scratch."""
        mine = dealt(self, dataset)
        valid = [valid_tokens(batch) for batch, _ in mine]
        padding = CallOrder()
        for real in valid:
            padding.batch(real is not None and not bool(real.any()))
        demand_tokens(self, padding)
        calls = [batches.Call(*batches.as_call(batch)) for batch, _ in mine]
        found = []
        with self._outside(), self._loader.looked_at(self._blocks[0]):
            for name in scratch:
                folder = self._state / name if self._offload == "disk" else None
                inputs = StoredInputs(self._blocks, [i for _, i in mine], valid, paired, folder, self._device)
                inputs.capture_stubs(self.model, calls)
                found.append(inputs)
        return found

    def _parameters(self, names: Sequence[str]) -> list[str]:
        """The parameters that hold the weights and biases of layers, each once."""
        found: dict[str, None] = {}
        for slot in (self._slots[name] for name in names):
            own = slot.owner(self.model)._parameters
            found |= {
                f"{slot.module}.{key}": None for key in (slot.key, slot.bias_key) if key and own.get(key) is not None
            }
        return list(found)

    def _write(self, index: int, stage: Any, inputs: StoredInputs | None) -> None:
        """Write a block by process 0, and what enters the next by those that have it."""

        def weights(file: Path) -> None:
            changed: dict[str, torch.Tensor] = {}
            for name in dict.fromkeys([*self._parameters(stage.names), *stage.changed]):
                pieces = self._stored.pieces(name, self.model.get_parameter(name).detach())
                changed |= {key: piece.cpu() for key, piece in pieces.items()}
            with files.atomic_file(file) as handle:
                write_tensors(handle, changed)

        going = inputs if index < len(self._blocks) - 1 else None
        rows = {n: self._own[n] for n in stage.names}
        self._files.write(self, index, rows, weights, going.save if going is not None else None)
