"""`prune_checkpoint`: a folder larger than memory pruned, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit import renorm, surgery
from slimkit.core import check, files
from slimkit.core.checkpoint import shards, stepwise
from slimkit.core.checkpoint.weightfile import Entry
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.jobs.folders import PLAN, copy_companions
from slimkit.core.lazy import door
from slimkit.core.prune.criteria import Criterion
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.core.showing import Report
from slimkit.prune import TorchPrune
from slimkit.stored import StoredModel, as_stored, held

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

__getattr__, __dir__ = door("slimkit", room="prune")

REPORT = "prune_report.json"
NO_DATA = (
    "a folder is pruned tensor by tensor by its weights alone: choose importance l1, l2, lamp or random, or prune the "
    "model in memory (PruneTorch) where it fits"
)

Array = np.ndarray[Any, Any]


class StoredPrune(TorchPrune):
    """A model whose values stay in files, as the pruner of the core sees it.

    Args:
        stored: the model.
        inputs: an example of what it takes, or None.
    """

    def __init__(self, stored: StoredModel, inputs: Any) -> None:
        super().__init__(stored.model, inputs)
        self._stored = stored

    def read(self, path: str) -> Array | None:
        return self._values(path).numpy()

    def _values(self, path: str) -> torch.Tensor:
        own = self._found[path].detach()
        tensor = self._stored.value(path) if own.device.type == "meta" or self._stored.find(path) else own
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class _Cutter:
    """Gives the tensors of a pruned folder one by one.

    Args:
        stored: the model before its cut.
        wing: it as the pruner sees it.
        plan: the cut.
    """

    def __init__(self, stored: StoredModel, plan: PrunePlan) -> None:
        self._stored = stored
        self._owners = stored.owners()
        first = {id(t): path for path, t in surgery.tensors(stored.model).items()}
        # The plan's word for each parameter: the first of a tied one's names, as tracing finds them.
        self._paths = {name: first.get(id(held(stored.model, name)), "") for name in set(self._owners.values())}
        self._indices, self._sizes = plan.indices, plan.sizes()
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def entries(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries of the result for tensors of the files."""
        return {key: self._entry(key) for key in keys}

    def _entry(self, key: str) -> Entry:
        place, path = self._stored.places[key], self._path(key)
        if path not in self._sizes:
            return stepwise.copied(key, place)
        name = self._owners[key]
        whole = torch.empty(self._sizes[path], device="meta")
        shape = self._sizes[path] if self._stored.is_whole(name) else self._stored.pieces(name, whole)[key].shape
        return Entry(place.dtype, tuple(shape))

    def _path(self, key: str) -> str:
        return self._paths.get(self._owners.get(key, ""), "")

    def tensor(self, key: str) -> Any:
        """A tensor of the result: a stored array where it was cut, else what passes it on."""
        path = self._path(key)
        if path not in self._indices:
            return shards.piece_of(self._stored.places[key])
        name = self._owners[key]
        if self._last[0] != name:
            self._last = ("", {})
            cut = surgery.select(self._stored.value(name), self._indices[path])
            self._last = (name, self._stored.pieces(name, cut))
        made = as_stored(self._last[1].pop(key))
        if not self._last[1]:
            self._last = ("", {})
        return made


class FolderPruner(PrunerBase):
    """Structural pruning of a folder: a pruner like any other, whose cut is written to another folder.

    Args:
        source: the folder.
        stored: its model.
        inputs: an example of what the model takes, or None.

    Attributes:
        model: the model without values.
    """

    def __init__(self, source: Path, stored: StoredModel, inputs: Any) -> None:
        super().__init__(StoredPrune(stored, inputs))
        self._source, self._stored = source, stored
        self.model = stored.model
        self.set_form("config")

    def set_importance_evaluation_function(self, function: Any = "auto", **data: Any) -> Self:
        """Choose how channels are scored, by weights alone; as the pruner's own."""
        if data.get("calibration") is not None:
            raise UnsupportedError(NO_DATA)
        return super().set_importance_evaluation_function(function, **data)

    def set_compensation(self, calibration: Any, damping: float | None = None) -> Self:
        """Refused: a repair reads data."""
        if calibration is not None:
            raise UnsupportedError(NO_DATA)
        return super().set_compensation(calibration, damping)

    def set_form(self, form: str) -> Self:
        """Choose which shapes may come out: "config" alone."""
        if form != "config":
            raise UnsupportedError(
                f"form must be 'config' for a folder, so that from_pretrained loads the result. Received: {form!r}"
            )
        return super().set_form(form)

    def prune(self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None) -> dict[str, Any]:
        """Nothing: a folder is left as it is, and `write` makes another one."""
        raise UnsupportedError("a folder is not pruned in place: write() makes another one")

    def write(
        self, target: Path, ratio: float, whole: Sequence[int | str] | None, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the pruned folder, or go on with it.

        Args:
            target: the folder.
            ratio: share to keep.
            whole: as in `analysis`.
            settings: what else decides the result, as plain JSON values.

        Returns:
            The report; see `prune_checkpoint`.
        """
        job = {
            "source": stepwise.identity(p.file for p in self._stored.places.values()),
            "config": files.digest_file(self._source / "config.json"),
            "settings": {"reserved_ratio": ratio, "un_prune_list": None if whole is None else list(whole), **settings},
        }
        return stepwise.write_folder(target, job, lambda _: self._work(ratio, whole), REPORT)

    def _work(self, ratio: float, whole: Sequence[int | str] | None) -> stepwise.Work:
        """Plan the cut, and say what is to be written."""
        stored = self._stored
        before = sum(p.numel() for p in stored.model.parameters())
        _, desc = self.analysis(ratio, whole)
        cutter = _Cutter(stored, PrunePlan(desc))
        found = [stepwise.Shard(name, cutter.entries(keys)) for name, keys in stepwise.layout(stored.places).items()]

        def make(shard: stepwise.Shard) -> Iterable[tuple[str, Any]]:
            for key in shard.entries:
                yield key, cutter.tensor(key)

        def rest(finished: Path) -> dict[str, Any]:
            self.prune_by_desc(desc)  # the model without values: its configuration and its report
            config: Any = stored.model.config
            config.save_pretrained(str(finished))
            copy_companions(self._source, finished)
            files.write_json(finished / PLAN, desc)
            after = sum(p.numel() for p in stored.model.parameters())
            facts = {"parameters_before": before, "parameters": after, "kept": after / before}
            return {"format": "slimkit-prune", "version": 1, "asked": ratio, **facts, "report": self.report()}

        return stepwise.Work(found, make, rest)


def folder_pruner(source: Path, inputs: Any = None, names: Callable[[str], str] | None = None) -> FolderPruner:
    """A pruner of a folder; see `prune_checkpoint` for the arguments and errors."""
    if (source / PLAN).exists():
        raise ConfigError(f"{source} holds a pruned model already; prune the original to the ratio wanted")
    stored = StoredModel(source, names, cache=True)
    if any(True for _ in renorm.weight_norms(stored.model)):
        raise UnsupportedError("a model with weight normalisation is not pruned from its folder: prune it in memory")
    return FolderPruner(source, stored, inputs)


def prune_checkpoint(
    src: PathLike,
    dst: PathLike,
    reserved_ratio: float = 0.75,
    un_prune_list: Sequence[int | str] | None = None,
    *,
    importance: str | Criterion | type[Criterion] | Callable[[Any], Any] = "auto",
    seed: int = 0,
    node_reserved_ratio: float | None = None,
    alignment: int = 16,
    form: str | None = None,
    parallel: int = 1,
    budget: str = "params",
    allocation: str | None = None,
    inputs: Any = None,
    names: Callable[[str], str] | None = None,
) -> Report:
    """Prune a Hugging Face folder of any size, holding one tensor of it in memory at a time.

    The plan is made on a model without values; scores are read tensor by tensor; each tensor is cut into new shards.
    The plan and the tensors are those that ``PruneTorch(model)`` with the same settings gives on the whole model. Whole
    shards wait until all are there; a run that is killed goes on when called again, and ends in the same bytes.

    Args:
        src: directory with config.json and .safetensors weights, in one file or in shards.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        reserved_ratio: share of the parameters (or multiplications) to keep, in (0, 1].
        un_prune_list: as in `PruneTorch.prune`.
        importance: l1, l2, lamp, bn_scale or random, a function of one output channel's weights, or a `Criterion` that
            needs no data; "auto" is l1.
        seed: of "random".
        node_reserved_ratio, alignment, parallel, budget, allocation: as in the pruner's setters of these names.
        form: "config" (what `from_pretrained` loads) alone; None is the same.
        inputs: an example of what the model takes; None finds one, as `PruneTorch(model)` does.
        names: parameter name of the transformers class -> tensor name in the files, for folders whose names differ by
            more than the base model's prefix.

    Returns:
        {"asked", "parameters_before", "parameters", "kept", "report": as `PruneTorch.report`}; the same is in
        ``dst/prune_report.json``, the plan in ``dst/plan.json``.

    Raises:
        FileFormatError: `src` is damaged or holds no safetensors.
        ArgumentError: a setting out of range; weights that are no numbers; `dst` holds something else.
        UnsupportedError: an importance that reads data, a model whose configuration cannot say the cut, a tensor that
            is not found, or `dst` was begun with other inputs.
        GraphError: the model cannot be traced without its values.
        ConfigError: another process is at work in `dst`; `src` was pruned already.
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.ratio(reserved_ratio, "reserved_ratio", one=True)
    stepwise.another_folder(source, target)
    pruner = folder_pruner(source, inputs, names)
    settings = {
        "importance": _named(importance),
        "seed": seed,
        "node_reserved_ratio": node_reserved_ratio,
        "alignment": alignment,
        "form": form,
        "parallel": parallel,
        "budget": budget,
        "allocation": allocation,
        "inputs": None if inputs is None else hashlib.sha256(repr(inputs).encode()).hexdigest(),
    }
    pruner.set_importance_evaluation_function(importance, seed=seed).set_alignment(alignment)
    pruner.set_parallel(parallel).set_budget(budget)
    if form is not None:
        pruner.set_form(form)
    if node_reserved_ratio is not None:
        pruner.set_node_reserved_ratio(node_reserved_ratio)
    if allocation is not None:
        pruner.set_allocation(allocation)
    return Report("pruned folder", pruner.write(target, reserved_ratio, un_prune_list, settings))


def _named(importance: Any) -> str:
    name = importance if isinstance(importance, str) else getattr(importance, "__qualname__", None)
    return str(name or type(importance).__qualname__)
