"""`merge_checkpoint`: a delta merged into a folder larger than memory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.checkpoint import shards, stepwise
from slimkit.core.checkpoint.weightfile import Entry
from slimkit.core.delta import inject, storage
from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.spec import PREFIX, DeltaReport
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.jobs.folders import PLAN, copy_companions
from slimkit.core.showing import Report
from slimkit.delta.held_base import held, restored
from slimkit.delta.storage import TorchStorage, as_tensor
from slimkit.stored import StoredModel, as_stored, tag_of, to_stubs

import torch
from torch import nn

REPORT = "merge_report.json"


class StoredDelta(TorchStorage):
    """What the wing does to a model whose weights stay in files: they are read where somebody looks at one.

    Args:
        stored: the model; its parameters have no memory.
    """

    def __init__(self, stored: StoredModel) -> None:
        self._stored = stored
        self.names = _named(stored.model)
        self.filled: set[int] = set()  # tensors of the base that came with the delta
        self.held: dict[int, str] = {}  # weights that the layer computes with in fewer bits

    def value(self, tensor: torch.Tensor) -> Any:
        return super().value(self.read(tensor))

    def sample(self, tensor: torch.Tensor) -> Any:
        keys = self._stored.keys(self.names[id(tensor)]) if self.is_stored(tensor) else []
        if len(keys) != 1:
            return super().sample(self.read(tensor))
        return shards.sampled(self._stored.places[keys[0]], sample_places(tensor.numel())).astype("float32")

    def fill(self, tensor: torch.Tensor, value: Any) -> None:
        if not self.is_stored(tensor):
            super().fill(tensor, value)
            return
        tensor.data = as_tensor(value).to(tensor.dtype, copy=True)
        self.filled.add(id(tensor))

    def holdable(self, module: nn.Module) -> bool:
        return id(module._parameters.get("weight")) in self.names

    def attach(self, kind: str, module: nn.Module, name: str, dtype: Any, options: Mapping[str, Any]) -> None:
        fewer = options.get("base_dtype")
        if fewer:  # the layer never runs: what it would compute with is made of the file's weight when it is merged
            self.held[id(module.weight)] = fewer
            vars(module)["held_kind"] = fewer
            options = {**options, "base_dtype": ""}
        super().attach(kind, module, name, dtype, options)

    def computed_with(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight with the values that its layer computes with."""
        value = self.read(tensor)
        fewer = self.held.get(id(tensor))
        return restored(*held(value, fewer), value.dtype) if fewer else value

    def exchange(self, parameter: Any, value: Any) -> Any:
        # What lies aside is never looked at: the folder is written once.
        return parameter.detach() if value is None else super().exchange(parameter, value)

    def is_stored(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's values are those of the files."""
        return id(tensor) in self.names and id(tensor) not in self.filled

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with its values."""
        return self._stored.value(self.names[id(tensor)]).to(tensor.dtype) if self.is_stored(tensor) else tensor


def _named(model: nn.Module) -> dict[int, str]:
    """id of each tensor of a model that files hold -> its first name."""
    found: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and PREFIX not in name:
            found.setdefault(id(tensor), name)
    return found


class _Merger:
    """Gives the tensors of a merged folder one by one.

    Args:
        stored: the base.
        access: the wing.
        delta: the delta's folder.
        options: of `load_delta`.
    """

    def __init__(self, stored: StoredModel, delta: PathLike, options: Mapping[str, Any]) -> None:
        self._stored = stored
        to_stubs(stored)
        self._access, model = StoredDelta(stored), stored.model
        self.report: DeltaReport = storage.load(self._access, model, delta, **options)
        layers = inject.mergeable(self._access, model)
        self._names = _named(model)  # once more: what was tied may have become two
        state = model.state_dict(keep_vars=True)
        sources = {id(source): layer for layer in layers.values() for source in layer.sources().values()}
        # file's tensor -> what the result holds of it
        self.given = [n for k, n in self._names.items() if k in self._access.filled or k not in self._access.names]
        self.tensors = {n: state[n].detach() for n in self.given}
        self._layers = {self._names[k]: layer for k, layer in sources.items()}
        # What the base's files have no tensor for was tied to another before the delta came.
        self.added = [n for n in self.given if stored.find(n) is None and n not in self._layers]
        # The other way round: what keeps the base's values lay under the name of what came with the delta.
        known = self._access.names
        self._kept = {
            n: known[id(t)]
            for n, t in state.items()
            if id(t) in known
            and id(t) not in self._access.filled
            and known[id(t)] in self.given
            and stored.find(n) is None
        }
        self.added += self._kept
        self.tensors.update({n: state[n].detach() for n in self._kept})
        changed = [n for n in (*self._layers, *self.given) if n not in self.added]
        self.owners = {key: name for name in changed for key in self._keys(name)}
        self._last: tuple[Any, dict[str, torch.Tensor]] = (None, {})

    def _keys(self, name: str) -> list[str]:
        """The tensors of the files that make up a changed parameter."""
        try:
            return self._stored.keys(name)
        except UnsupportedError:
            if name not in self._layers or not self.given:
                raise
            raise UnsupportedError(
                f"{name} is adapted, and the base keeps it as another tensor that the delta gives values of its own "
                "(tied embeddings): merge in memory (load_delta, merge_delta)"
            ) from None

    def tensor(self, key: str) -> torch.Tensor:
        """A changed tensor of the files."""
        if key in self._kept:
            return self._stored.value(self._kept[key])
        if key in self.added:
            return self.tensors[key]
        name = self.owners[key]
        layer = self._layers.get(name)
        if layer is None:
            return self._stored.pieces(name, self.tensors[name])[key]
        if self._last[0] is not layer:
            self._last = (None, {})
            self._last = (layer, self._merged(layer))
        return self._last[1][key]

    @torch.no_grad()
    def _merged(self, layer: Any) -> dict[str, torch.Tensor]:
        """What the files are to hold of all that a layer's delta changes."""
        before = []
        found: dict[str, torch.Tensor] = {}
        try:
            for source in layer.sources().values():
                before.append((source, source.data))
                source.data = self._access.computed_with(source)
            layer.write_weight(layer.merged_weight())
            for source, _ in before:
                found |= self._stored.pieces(self._names[id(source)], source.data)
        finally:
            for source, stub in before:
                source.data = stub
        return found


def merge_checkpoint(
    base: PathLike,
    delta: PathLike,
    dst: PathLike,
    *,
    name: str | None = None,
    same_base: bool = False,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    names: Callable[[str], str] | None = None,
) -> Report:
    """Merge a delta (lora, ia3, miss, shira) into a Hugging Face folder of any size, one tensor in memory at a time.

    The result is a folder like the base, shard for shard, that `from_pretrained` loads, with the bytes that merging the
    whole model and saving it gives. Whole shards wait until all are there; a run that is killed goes on when called
    again, and ends in the same bytes.

    Args:
        base: directory with config.json and .safetensors weights, in one file or in shards.
        delta: a slimkit bundle of either framework, or a Hugging Face PEFT adapter. What trained beside it (a head,
            token rows) goes into the result too.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        name: the delta's name in the report; None keeps its own.
        same_base: refuse a base whose weights are not those the delta was trained on.
        rename: how paths in the delta are called in the base: {beginning: beginning}, or a function of a path.
        names: parameter name of the transformers class -> tensor name in the base's files, for folders whose names
            differ by more than the base model's prefix.

    Returns:
        {"kind", "name", "layers": those merged, "given": tensors that came with the delta, "added": those the base has
        no tensor for, "merged" and "copied": numbers of tensors, "notes"}; also in ``dst/merge_report.json``. And
        "bytes": what this call has read and written.

    Raises:
        FileFormatError: a file is damaged, or holds no safetensors; a tensor of the delta is missing, left over or of
            another shape.
        ArgumentError: the base lacks a layer, or has one of another shape; (same_base) other weights; `dst` holds
            something else.
        UnsupportedError: a delta that cannot be merged (adapters, prefixes, prompts), a weight shared with another
            module, a tensor that is not found, or `dst` was begun with other inputs.
        ConfigError: another process is at work in `dst`.
    """
    source, target, folder = files.as_path(base, "base"), files.as_path(dst, "dst"), files.as_path(delta, "delta")
    check.boolean(same_base, "same_base")
    stepwise.another_folder(source, target)
    if not folder.is_dir():
        raise FileFormatError(f"delta must be an existing folder. Received: {str(folder)!r}{files.meant(folder)}")
    stored = StoredModel(source, names)
    tied = bool(getattr(stored.model.config, "tie_word_embeddings", False))
    merger = _Merger(stored, folder, {"name": name, "same_base": same_base, "rename": rename})
    plan = _plan(stored.places, merger)

    def make(shard: stepwise.Shard) -> Iterable[tuple[str, Any]]:
        for key in shard.entries:
            if key in merger.owners or key in merger.added:
                yield key, as_stored(merger.tensor(key))
            else:
                yield key, shards.piece_of(stored.places[key])

    def rest(finished: Path) -> dict[str, Any]:
        config = files.read_json(source / "config.json")
        own: Any = stored.model.config
        if tied and not own.tie_word_embeddings:
            config["tie_word_embeddings"] = False  # the delta brought a tensor of its own
        files.write_json(finished / "config.json", config)
        if (source / PLAN).exists():
            files.write_json(finished / PLAN, files.read_json(source / PLAN))
        copy_companions(source, finished)
        changed = [*merger.owners, *merger.added]
        return {
            "kind": merger.report.kind,
            "name": merger.report.name,
            "layers": sorted(merger.report.layers),
            "given": sorted(merger.given),
            "added": merger.added,
            "merged": len(changed),
            "copied": sum(len(shard.entries) for shard in plan) - len(changed),
            "notes": list(merger.report.notes),
        }

    job = {
        "base": stepwise.identity(p.file for p in stored.places.values()),
        "config": files.digest_file(source / "config.json"),
        "delta": {f.name: files.digest_file(f) for f in sorted(folder.iterdir()) if f.is_file()},
        "name": merger.report.name,
        "layers": sorted(merger.report.layers),
    }
    own = {p.file for p in stored.places.values()}
    return Report("merge", stepwise.write_folder(target, own, job, lambda _: stepwise.Work(plan, make, rest), REPORT))


def _plan(places: Mapping[str, shards.Place], merger: _Merger) -> list[stepwise.Shard]:
    """The base's files again, what the delta adds in the last of them."""
    found = []
    for name, keys in stepwise.layout(places).items():
        found.append(stepwise.Shard(name, {key: stepwise.copied(key, places[key]) for key in keys}))
    for key in merger.added:
        tensor = merger.tensors[key]
        last = found[-1]
        entry = Entry(tag_of(tensor.dtype), tuple(tensor.shape))
        found[-1] = stepwise.Shard(last.name, {**last.entries, key: entry})
    return found
