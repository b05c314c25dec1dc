"""`prune_checkpoint`: a folder larger than memory pruned, one tensor at a time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slimkit import renorm, surgery
from slimkit.core import check, files
from slimkit.core.checkpoint import shards, stepwise
from slimkit.core.checkpoint.weightfile import Entry, Piece
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.files import PathLike
from slimkit.core.jobs.folders import PLAN, copy_companions
from slimkit.core.lazy import door
from slimkit.core.prune.criteria import Criterion
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.core.showing import Report
from slimkit.core.weights.cut import take
from slimkit.stored import StoredModel, as_stored, digest_of, held, read_rows
from slimkit.stored_prune import Repaired, StoredPrune
from slimkit.turned_folder import load_rotation, part_stored, save_rotation, turn_stored

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

__getattr__, __dir__ = door("slimkit", room="prune")

REPORT = "prune_report.json"
Array = np.ndarray[Any, Any]

_AXES = "rotation.safetensors"
_SIDE_BY_SIDE = 2  # what goes in and what comes out of the experts of one layer
_CUT_BYTES = 16 << 20  # read at once of what is cut


class _Cutter:
    """Gives the tensors of a pruned folder one by one.

    Args:
        stored: the model before its cut.
        plan: the cut.

    Attributes:
        repaired: layers that were refitted after it, or None.
    """

    def __init__(self, stored: StoredModel, plan: PrunePlan) -> None:
        self._stored = stored
        self._owners = stored.owners()
        first = {id(t): path for path, t in surgery.tensors(stored.model).items()}
        # The plan's word for each parameter: the first of a tied one's names, as tracing finds them.
        self._paths = {name: first.get(id(held(stored.model, name)), "") for name in set(self._owners.values())}
        self._indices, self._sizes = plan.indices, plan.sizes()
        self._pieces: dict[str, dict[str, tuple[int, ...]]] = {}  # parameter of several tensors -> their shapes
        # The parts of parameters that lie in several tensors, which files hold side by side with another's.
        self._last: dict[str, dict[str, torch.Tensor]] = {}
        self.repaired: Repaired | None = None

    def entries(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries of the result for tensors of the files; those of experts that go are left out."""
        return {key: entry for key in keys if (entry := self._entry(key)) is not None}

    def left_alone(self) -> list[str]:
        """In words, the tensors of the files that the model has no place for: no plan speaks of them."""
        left = [key for key in self._stored.places if key not in self._owners]
        if not left:
            return []
        named = ", ".join(left[:5]) + (" ..." if len(left) > 5 else "")
        return [
            f"{len(left)} tensors belong to nothing in {type(self._stored.model).__name__}, and stay whole: {named}"
        ]

    def _entry(self, key: str) -> Entry | None:
        place, path = self._stored.places[key], self._path(key)
        if path not in self._sizes:
            return stepwise.copied(key, place)
        name = self._owners[key]
        if self._stored.is_whole(name):
            return Entry(place.dtype, tuple(self._sizes[path]))
        if name not in self._pieces:
            whole = torch.empty(self._sizes[path], device="meta")
            self._pieces[name] = {k: tuple(t.shape) for k, t in self._stored.pieces(name, whole).items()}
        shape = self._pieces[name].get(key)
        return None if shape is None else Entry(place.dtype, shape)

    def _path(self, key: str) -> str:
        return self._paths.get(self._owners.get(key, ""), "")

    def value(self, name: str) -> torch.Tensor | None:
        """A parameter's or buffer's values after the cut, by its first name; None where no file holds it."""
        value, path = self._stored.held_value(name), self._paths.get(name, "")
        return value if value is None or path not in self._indices else surgery.select(value, self._indices[path])

    def tensor(self, key: str) -> Any:
        """A tensor of the result: a stored array where it was cut, else what passes it on."""
        path = self._path(key)
        name = self._owners.get(key, "")
        if self.repaired is not None and name and (fitted := self.repaired.value(name)) is not None:
            return as_stored(self._stored.pieces(name, fitted)[key])
        if path not in self._indices:
            return shards.piece_of(self._stored.places[key])
        rows = self._indices[path][0]
        # Where rows change their order, or a parameter lies in several tensors, it is cut whole.
        if self._stored.is_whole(name) and (rows is None or bool((np.diff(rows) > 0).all())):
            return _cut_piece(self._stored.places[key], self._indices[path], self._sizes[path])
        if name not in self._last:
            while len(self._last) >= _SIDE_BY_SIDE:
                self._last.pop(next(iter(self._last)))
            cut = self.value(name)
            assert cut is not None
            self._last[name] = self._stored.pieces(name, cut)
        made = as_stored(self._last[name].pop(key))
        if not self._last[name]:
            del self._last[name]
        return made


def _cut_piece(place: shards.Place, axes: Sequence[Array | None], shape: tuple[int, ...]) -> Piece:
    """What is kept of a tensor, cut while it passes from file to file."""
    first = axes[0] if axes[0] is not None else np.arange(place.shape[0])
    rows = max(1, _CUT_BYTES * place.shape[0] // max(1, place.stop - place.start))

    def chunks() -> Iterator[memoryview]:
        for start in range(0, place.shape[0], rows):
            kept = first[(first >= start) & (first < start + rows)] - start
            if len(kept):
                part = read_rows(place, start, min(start + rows, place.shape[0]))
                cut = take(as_stored(part), (kept, *axes[1:]))
                yield np.ascontiguousarray(cut).reshape(-1).view(np.uint8).data

    return Piece(shape, chunks)


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

    def set_form(self, form: str) -> Self:
        """Choose which shapes may come out: "config" alone."""
        if form != "config":
            raise UnsupportedError(
                f"form must be 'config' for a folder, so that from_pretrained loads the result. Received: {form!r}"
            )
        return super().set_form(form)

    def set_budget(self, budget: str, table: Any = None) -> Self:
        """Choose what the ratio counts: "params", "macs" or "kv_cache"."""
        if budget == "latency":
            raise UnsupportedError(
                "the budget latency times the model in memory, and a folder stays on disk: prune the model, or choose "
                "another budget"
            )
        return super().set_budget(budget, table)

    def prune(self, reserved_ratio: float = 0.75, un_prune_list: Sequence[int | str] | None = None) -> dict[str, Any]:
        """Nothing: a folder is left as it is, and `write` makes another one."""
        raise UnsupportedError("a folder is not pruned in place: write() makes another one")

    def write(
        self,
        target: Path,
        ratio: float,
        whole: Sequence[int | str] | None,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the pruned folder, or go on with it.

        Args:
            target: the folder.
            ratio: share to keep.
            whole: as in `analysis`.
            settings: what else decides the result, as plain JSON values.
            defaults: of settings, for runs that were begun before these came.

        Returns:
            The report; see `prune_checkpoint`.
        """
        repair = self._repair if self._repair_set else self._scoring.calibration
        own = {p.file for p in self._stored.places.values()}
        job = {
            "source": stepwise.identity(own),
            "config": files.digest_file(self._source / "config.json"),
            "settings": {"reserved_ratio": ratio, "un_prune_list": None if whole is None else list(whole), **settings},
            "calibration": None if self._scoring.calibration is None else digest_of(self._scoring.calibration),
            "compensation": None if repair is None else digest_of(repair),
        }
        begin = functools.partial(self._work, ratio=ratio, whole=whole)
        return stepwise.write_folder(target, own, job, begin, REPORT, {"settings": defaults})

    def _work(self, state: Path, ratio: float, whole: Sequence[int | str] | None) -> stepwise.Work:
        """Plan the cut, repair it, and say what is to be written."""
        stored = self._stored
        before = sum(p.numel() for p in stored.model.parameters())
        desc = self._planned_once(state / PLAN, ratio, whole)
        layout = self._laid_out(state, PrunePlan(desc))
        cutter = _Cutter(stored, PrunePlan(desc))
        refit = self._refit(state, desc, cutter)
        found = [stepwise.Shard(name, entries) for name, keys in layout.items() if (entries := cutter.entries(keys))]

        def make(shard: stepwise.Shard) -> Iterable[tuple[str, Any]]:
            for key in shard.entries:
                yield key, cutter.tensor(key)

        def rest(finished: Path) -> dict[str, Any]:
            # The model without values: its configuration and its report.
            self.prune_by_desc(desc, weights_follow=True)
            config: Any = stored.model.config
            config.save_pretrained(str(finished))
            copy_companions(self._source, finished)
            files.write_json(finished / PLAN, desc)
            after = sum(p.numel() for p in stored.model.parameters())
            facts = {"parameters_before": before, "parameters": after, "kept": after / before}
            report = {**self.report(), **refit}
            report.pop("seconds")  # a run that went on after a kill ends in the same bytes
            report["notes"] = [*report.get("notes", ()), *cutter.left_alone()]
            return {"format": "slimkit-prune", "version": 1, "asked": ratio, **facts, "report": report}

        return stepwise.Work(found, make, rest)

    def _planned_once(self, file: Path, ratio: float, whole: Sequence[int | str] | None) -> dict[str, Any]:
        """The plan; where data made it, it is made once and kept."""
        if file.exists():
            kept = files.read_json(file)
            self._report = kept["report"]
            found: dict[str, Any] = kept["plan"]
            return found
        _, desc = self.analysis(ratio, whole)
        if self._repair_data(desc["made"]["importance"] == "output") is not None:
            desc["made"]["repaired"] = True
        if self._scoring.calibration is not None:
            if self._scoring.rotation is not None:
                save_rotation(file.with_name(_AXES), self._scoring.rotation)
            files.write_json(file, {"plan": desc, "report": self._report})
        return desc

    def _laid_out(self, state: Path, plan: PrunePlan) -> dict[str, list[str]]:
        """Turn the model as the plan wants it; returns file -> its tensors, as the result will have them."""
        stored = self._stored
        if not any("rotated" in step for step in plan.steps):
            return stepwise.layout(stored.places)
        self._solved()
        stream = self._stream
        assert stream is not None
        kept = plan.indices[stream.table][1]
        assert kept is not None
        part_stored(stored, plan.parted)
        self._wing.turn((), {})  # the model's parameters are others now
        layout = stepwise.layout(stored.places)
        turn_stored(state / "turned", stored, stream, load_rotation(state / _AXES), kept, self._wing.read)
        return layout

    def _refit(self, state: Path, desc: Mapping[str, Any], cutter: _Cutter) -> dict[str, Any]:
        """Repair the cut where data is there for it; what the report says of it."""
        data = self._repair_data(desc["made"]["importance"] == "output")
        if data is None:
            return {}
        layers, wing = self._solved().graph.layers, cast("StoredPrune", self._wing)
        cutter.repaired = Repaired(state / "repaired")
        told = wing.repaired(PrunePlan(desc), layers, data, self._damping, cutter.value, cutter.repaired)
        return {"compensation": told}


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
    calibration: Any = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    compensation: Any = "calibration",
    damping: float | None = None,
    node_reserved_ratio: float | None = None,
    alignment: int = 16,
    form: str | None = None,
    parallel: int = 1,
    budget: str = "params",
    allocation: str | None = None,
    rotation: bool = False,
    inputs: Any = None,
    names: Callable[[str], str] | None = None,
) -> Report:
    """Prune a Hugging Face folder of any size, holding one tensor of it in memory at a time.

    The plan is made on a model without values; scores are read tensor by tensor; each tensor is cut into new shards.
    With calibration one block, what stands outside the blocks and one batch are in memory, and second moments of up to
    4 GB. The plan and the tensors are those that ``PruneTorch(model)`` with the same settings gives on the whole model.
    Whole shards wait until all are there; a run that is killed goes on when called again, and ends in the same bytes.

    Args:
        src: directory with config.json and .safetensors weights, in one file or in shards.
        dst: directory for the result, absent or holding an unfinished run of the same job.
        reserved_ratio: share of the parameters (or multiplications) to keep, in (0, 1].
        un_prune_list: as in `PruneTorch.prune`.
        importance: as in `PruneTorch.set_importance_evaluation_function`, but taylor and hessian, which need all
            weights' gradients at once.
        calibration: batches, for "auto", "output" and "activation".
        loss: (model outputs, batch) -> scalar, for "output"; unset, how far the model's answers move.
        seed: of "random", and of the signs that "output" draws.
        compensation: batches to repair the cut on; "calibration": the same ones where the importance is "output", as
            `PruneTorch` has it; None: no repair.
        damping: of the repair; None chooses it.
        node_reserved_ratio, alignment, parallel, budget, allocation: as in the pruner's setters of these names.
        rotation: turn the hidden width before it is cut, as `PruneTorch.set_rotation`; a turned copy of the weights
            then lies beside the unfinished result, and one parameter of it is in memory in float64 while it is made.
        form: "config" (what `from_pretrained` loads) alone; None is the same.
        inputs: an example of what the model takes; None finds one, as `PruneTorch(model)` does.
        names: parameter name of the transformers class -> tensor name in the files, for folders whose names differ by
            more than the base model's prefix.

    Returns:
        {"asked", "parameters_before", "parameters", "kept", "report": as `PruneTorch.report`}; the same is in
        ``dst/prune_report.json``, the plan in ``dst/plan.json``. And "bytes": what this call has read and written.

    Raises:
        FileFormatError: `src` is damaged or holds no safetensors.
        ArgumentError: a setting out of range; weights that are no numbers; `dst` holds something else.
        UnsupportedError: taylor and hessian, a model whose configuration cannot say the cut or (calibrated) without
            equal blocks, a tensor that is not found, or `dst` was begun with other inputs.
        GraphError: the model cannot be traced without its values.
        ConfigError: another process is at work in `dst`; `src` was pruned already.
    """
    source, target = files.as_path(src, "src"), files.as_path(dst, "dst")
    check.ratio(reserved_ratio, "reserved_ratio", one=True)
    stepwise.another_folder(source, target)
    pruner = folder_pruner(source, inputs, names)
    settings = {
        "importance": _named(importance),
        "loss": None if loss is None else _named(loss),
        "seed": seed,
        "damping": damping,
        "node_reserved_ratio": node_reserved_ratio,
        "alignment": alignment,
        "form": form,
        "parallel": parallel,
        "budget": budget,
        "allocation": allocation,
        "rotation": rotation,
        "inputs": None if inputs is None else hashlib.sha256(repr(inputs).encode()).hexdigest(),
    }
    pruner.set_rotation(rotation).set_importance_evaluation_function(
        importance, calibration=calibration, loss=loss, seed=seed
    )
    pruner.set_alignment(alignment)
    if not (isinstance(compensation, str) and compensation == "calibration"):
        pruner.set_compensation(compensation, damping)
    elif damping is not None:
        pruner.set_compensation(calibration, damping)
    pruner.set_parallel(parallel).set_budget(budget)
    if form is not None:
        pruner.set_form(form)
    if node_reserved_ratio is not None:
        pruner.set_node_reserved_ratio(node_reserved_ratio)
    if allocation is not None:
        pruner.set_allocation(allocation)
    return Report("pruned folder", pruner.write(target, reserved_ratio, un_prune_list, settings, {"rotation": False}))


def _named(importance: Any) -> str:
    name = importance if isinstance(importance, str) else getattr(importance, "__qualname__", None)
    return str(name or type(importance).__qualname__)
