"""A model whose blocks come from a checkpoint's files one by one, and go back to files."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slimkit import bridge
from slimkit.core import batch as batches
from slimkit.core import files
from slimkit.core.checkpoint import shards
from slimkit.core.errors import UnsupportedError
from slimkit.core.lazy import library
from slimkit.core.sparse.call_order import CallOrder
from slimkit.core.sparse.framework import CalibratedBlock
from slimkit.core.sparse.processes import demand_tokens
from slimkit.sparse import memory
from slimkit.sparse.chain import LentBlock, trace_block
from slimkit.sparse.framework import TorchSparse, block_paths
from slimkit.sparse.inputs import BlockInputs, valid_tokens
from slimkit.sparse.layouts import Layouts

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointSparse(TorchSparse):
    """A model whose blocks come from files one by one, and go back to files.

    Args:
        source: the folder.
        state: where the run's own files lie.
        places: where each tensor's bytes lie.
        names: parameter name -> tensor name, or None.
        compute: what floats are computed in, or None: as they are stored. Solved weights are rounded to what is stored
            at once, so that later layers see what the files will hold.
    """

    def __init__(
        self,
        source: Path,
        state: Path,
        places: dict[str, shards.Place],
        names: Callable[[str], str] | None,
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__(_empty_model(source))
        self._compute = compute
        self._state, self._places, self._names = state, places, names
        self._layouts = Layouts(self.model)
        self._blocks: list[str] = []
        self._own: dict[str, Any] = {}
        self._changed: set[str] = set()  # parameters of the block in work that are no longer what the files hold
        self.keeps_masks = False

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

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Nothing to remember: the source stays as it is."""
        return lambda: None

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """One stage a block: loaded, made sparse, written, and let go."""
        with_data = bool(dataset)
        done = self._done()
        inputs = self._capture(dataset, paired) if with_data else None
        if inputs is not None:
            padding = CallOrder()
            for valid in inputs.valid:
                padding.batch(valid is not None and not bool(valid.any()))
            demand_tokens(self, padding)
        if inputs is not None and 0 < done < len(self._blocks):
            inputs.load(self._state / f"activations-{done:05d}")
        for index, path in enumerate(self._blocks):
            mine = [n for n in names if n.startswith(path + ".")]
            if index < done:
                rows = files.read_json(self._state / f"block-{index:05d}.json")
                yield _Done(mine, rows)
                continue
            block = self._load(path)
            dense = _without_weights(block) if paired and inputs is not None else None
            self._changed.clear()
            modules = {n: (n, self._slots[n]) for n in mine}
            if inputs is None:
                stage: Any = _Undata(mine)
            else:
                found = trace_block(path, block, inputs, modules)
                lend = partial(self._dense_weights, path, block, dense)
                last = index == len(self._blocks) - 1
                stage = LentBlock(lend, self._round, path, block, dense, inputs, modules, found.feeds, found, last)
            stage.names = mine
            yield stage
            self._write(index, stage, inputs)
            self._release(path)
            del block, dense, stage

    @contextlib.contextmanager
    def _dense_weights(self, path: str, block: torch.nn.Module, dense: torch.nn.Module | None) -> Iterator[None]:
        """Give a block's dense twin its weights: the block's own where they have not changed, else from the files."""
        if dense is None:
            yield
            return
        own = {f"{path}.{n}": p for n, p in block.named_parameters()}
        values = {n: p for n, p in own.items() if n not in self._changed} | self._read(
            n for n in own if n in self._changed
        )
        try:
            _fill(dense, path, values)
            yield
        finally:
            _to_meta(dense)

    def store(self, name: str, weight: torch.Tensor, bias_shift: torch.Tensor | None) -> None:
        """Put a weight in place and shift the bias."""
        changed = self._parameters([name])
        self._changed.update(changed)
        super().store(name, weight, bias_shift)
        self._round(changed)

    def _round(self, parameters: Iterable[str]) -> None:
        """Leave in parameters what their files will hold, in place."""
        for name in parameters if self._compute is not None else ():
            value = self.model.get_parameter(name).detach()
            value.copy_(value.to(DTYPES[self._places[self._keys(name)[0]].dtype]))

    def finished(self) -> dict[str, shards.Place]:
        """Where the new bytes of every changed tensor lie."""
        found: dict[str, shards.Place] = {}
        for index in range(len(self._blocks)):
            found |= shards.header(self._state / f"block-{index:05d}.safetensors")
        return found

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Keep a layer's row of the report, to be written with its block."""
        self._own[name] = row
        memory.trim()

    def _done(self) -> int:
        done = 0
        while (self._state / f"block-{done:05d}.json").exists():
            done += 1
        return done

    def _find(self, name: str) -> str | None:
        """The tensor of the files that a name stands for, with the base model's prefix added or left out."""
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        for key in (name, name.removeprefix(prefix), prefix + name):
            for old, new in (("", ""), (".weight", ".gamma"), (".bias", ".beta")):
                if key.endswith(old) and key.removesuffix(old) + new in self._places:
                    return key.removesuffix(old) + new
        return None

    def _keys(self, name: str) -> list[str]:
        """The tensors of the files that make up a parameter: one, unless experts lie in the files one by one."""
        if self._names is not None:
            name = self._names(name)
        whole = self._find(name)
        if whole is not None:
            return [whole]
        pieces = self._layouts.split(name, self.model.get_parameter(name).to("meta")) if self._names is None else {}
        found = [self._find(piece) for piece in pieces]
        if not found or None in found:
            raise UnsupportedError(
                f"src must hold a tensor for {name!r}, under this name or with the base model's prefix added or left "
                "out; pass `names` for files that name it otherwise."
            )
        return [key for key in found if key is not None]

    def _read(self, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}
        for name in parameters:
            pieces = {key: self._tensor(name, self._places[key]) for key in self._keys(name)}
            values[name] = next(iter(pieces.values())) if self._is_whole(name) else self._layouts.join(pieces)
        return values

    def _is_whole(self, name: str) -> bool:
        return self._names is not None or self._find(name) is not None

    def _tensor(self, name: str, place: shards.Place) -> torch.Tensor:
        # A plain read: a mapped shard would stay in memory, page by page, for as long as it is open.
        if place.dtype not in DTYPES:
            raise UnsupportedError(f"src must hold floating tensors; {name!r} is {place.dtype}.")
        data = bytearray(place.stop - place.start)
        with open(place.file, "rb") as handle:
            handle.seek(place.start)
            handle.readinto(data)
        stored = torch.frombuffer(data, dtype=DTYPES[place.dtype]).reshape(place.shape)
        return stored if self._compute is None else stored.to(self._compute)

    def _load(self, path: str) -> torch.nn.Module:
        block = bridge.get_module(self.model, path)
        values = self._read(f"{path}.{n}" for n, _ in block.named_parameters())
        return _fill(block, path, values)

    def _release(self, path: str) -> None:
        _to_meta(bridge.get_module(self.model, path))

    def _capture(self, dataset: Iterable[Any], paired: bool) -> BlockInputs:
        """Run what comes before the blocks, then note how each block is called."""
        inside = tuple(b + "." for b in self._blocks)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        late = {id(p) for p in head.parameters()} if head is not None else set()
        table = self.model.get_input_embeddings().weight
        outside = [
            n
            for n, p in self.model.named_parameters()
            if not n.startswith(inside) and (id(p) not in late or p is table)
        ]
        early = []
        for name in outside:
            with contextlib.suppress(UnsupportedError):  # a fresh head has no weights, and runs after the blocks
                self._keys(name)
                early.append(name)
        self.model.load_state_dict(self._read(early), strict=False, assign=True)
        self._load(self._blocks[0])
        inputs = BlockInputs.of_stubs(
            self.model,
            [_call(b) for b in dataset],
            [valid_tokens(b) for b in dataset],
            self._blocks,
            self._state / "activations",
            paired,
        )
        self._release(self._blocks[0])
        _to_meta(self.model, early)
        return inputs

    def _parameters(self, names: Sequence[str]) -> list[str]:
        """The parameters that hold the weights and biases of layers, each once."""
        found: dict[str, None] = {}
        for slot in (self._slots[name] for name in names):
            own = slot.owner(self.model)._parameters
            found |= {
                f"{slot.module}.{key}": None for key in (slot.key, slot.bias_key) if key and own.get(key) is not None
            }
        return list(found)

    def _write(self, index: int, stage: Any, inputs: BlockInputs | None) -> None:
        changed: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys([*self._parameters(stage.names), *stage.changed]):
            value = self.model.get_parameter(name).detach()
            pieces = [value] if self._is_whole(name) else self._layouts.split(name, value).values()
            for key, piece in zip(self._keys(name), pieces):
                changed[key] = piece.to(DTYPES[self._places[key].dtype]).contiguous()
        with files.atomic_file(self._state / f"block-{index:05d}.safetensors") as handle:
            _save(handle, changed)
        if inputs is not None and index < len(self._blocks) - 1:
            with files.atomic_directory(self._state / f"activations-{index + 1:05d}") as folder:
                inputs.save(folder)
        # Last: its presence says that the block is done.
        files.write_json(self._state / f"block-{index:05d}.json", {n: self._own[n] for n in stage.names})
        shutil.rmtree(self._state / f"activations-{index:05d}", ignore_errors=True)


class _Undata:
    """A block of a method that needs no data."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.changed: list[str] = []
        self.rows: Mapping[str, dict[str, Any]] | None = None
        self.feeds: list[tuple[str, ...]] = []
        self.joined: dict[str, str] = {}
        self.reached: Mapping[str, float] = {}

    def replay(self, names: Sequence[str], seen: Any) -> None:
        """No data."""

    def join(self) -> None:
        """No stream."""

    def outputs(self) -> Iterator[torch.Tensor]:
        """No batches."""
        return iter(())

    def trained(self, inherited: float = 1.0) -> None:
        """Nothing to train by."""

    def advance(self) -> None:
        """No activations."""


class _Done(_Undata):
    """A block that an earlier run finished."""

    def __init__(self, names: list[str], rows: dict[str, Any]) -> None:
        super().__init__(names)
        self.rows = rows


def _save(handle: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file from the tensors' own memory: its library would hold the whole block a second time."""
    written = {dtype: name for name, dtype in DTYPES.items()}
    entries, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": written[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    handle.write(struct.pack("<Q", len(head)) + head)
    for tensor in tensors.values():
        handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def _fill(module: torch.nn.Module, path: str, values: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Put weights, named by whole paths, into the module at a path, without gradients."""
    module.load_state_dict({n[len(path) + 1 :]: v for n, v in values.items()}, strict=False, assign=True)
    return module.requires_grad_(False)


def _to_meta(module: torch.nn.Module, names: Iterable[str] | None = None) -> None:
    """Let a module's weights go, all or those named; their shapes stay."""
    names = [n for n, _ in module.named_parameters()] if names is None else names
    meta = {n: torch.empty_like(module.get_parameter(n), device="meta") for n in names}
    module.load_state_dict(meta, strict=False, assign=True)


def _without_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module whose weights are shapes only."""
    meta = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
    return copy.deepcopy(module, meta)


def _call(batch: Any) -> batches.Call:
    return batches.Call(*batches.as_call(batch))


def _empty_model(source: Path) -> torch.nn.Module:
    """The checkpoint's model without weights; buffers are real, for they are computed, not stored."""
    transformers = library("transformers", "hf")
    accelerate = library("accelerate", "torch")
    config = transformers.AutoConfig.from_pretrained(str(source))
    kinds = getattr(config, "architectures", None) or []
    kind = next((getattr(transformers, k) for k in kinds if hasattr(transformers, k)), None)
    with accelerate.init_empty_weights(include_buffers=False):
        model = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()
