"""A model whose values stay in a folder, as the pruner sees it: scored, calibrated and repaired without being held."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from slimkit import bridge
from slimkit.compensate import TorchRepair
from slimkit.core import files
from slimkit.core.checkpoint import shards
from slimkit.core.checkpoint.weightfile import Entry, stream_safetensors
from slimkit.core.errors import UnsupportedError
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import RepairStage, repair
from slimkit.lent import LentModel
from slimkit.prune import TorchPrune, mean_outputs
from slimkit.signals import layer_signals
from slimkit.stored import FileArray, StoredModel, as_stored, floats, read_place, tag_of
from slimkit.turning import first_names

import torch

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
        path = self._named(path)
        if self._is_own(path):
            return self._values(path).numpy()
        keys = self._stored.keys(path)
        if len(keys) == 1 and self._found[path].dim() > 1:
            place: Any = FileArray(self._stored.places[keys[0]])
            return cast("Array", place)
        return self._values(path).numpy()

    def _named(self, path: str) -> str:
        """The first name of a tied tensor."""
        return path if path in self._found else first_names(self.model)[path]

    def _values(self, path: str) -> torch.Tensor:
        path = self._named(path)
        return floats(self._found[path].detach() if self._is_own(path) else self._stored.value(path))

    def _is_own(self, path: str) -> bool:
        """Whether a tensor is computed when the model is made, and in no file."""
        return self._found[path].device.type != "meta" and self._stored.find(path) is None

    def gradients(self, data: Iterable[Any], loss: Callable[..., Any] | None, square: bool) -> dict[str, Array]:
        raise UnsupportedError(
            "the importances taylor and hessian need the gradient of every weight at once, as much as the whole model: "
            "choose output, activation or one that needs no data, or prune the model in memory where it fits"
        )

    def activations(self, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Array]:
        lent = LentModel(copy.deepcopy(self.model), self._stored.held_value)
        with lent.open():
            return mean_outputs(lent.model, data, layers)

    def signals(
        self, data: Iterable[Any], layers: Sequence[str], loss: Callable[..., Any] | None, seed: int
    ) -> Mapping[str, LayerSignal | ExpertSignal]:
        lent = LentModel(copy.deepcopy(self.model), self._stored.held_value)
        with lent.open(), lent.forgetting():
            return layer_signals(lent.model, data, layers, loss, seed, lambda: lent.recomputing)

    def repaired(
        self,
        plan: PrunePlan,
        layers: Sequence[str],
        data: Any,
        damping: float | None,
        cut: Callable[[str], torch.Tensor | None],
        kept: Repaired,
    ) -> dict[str, Any]:
        """Refit the layers of the cut model, block by block; what is kept already is not fitted again.

        Args:
            plan: the cut.
            layers: paths in the order they run.
            data: calibration batches.
            damping: see `core.prune.refit.repair`.
            cut: first name of a parameter or buffer -> its values after the cut.
            kept: where the refitted values go.

        Returns:
            What `core.prune.refit.repair` reports.
        """
        small = TorchPrune(copy.deepcopy(self.model), None)
        small.cut(plan, plan.match(small.shapes()))

        def now(name: str) -> torch.Tensor | None:
            found = kept.value(name)
            return cut(name) if found is None else found

        dense, pruned = LentModel(copy.deepcopy(self.model), self._stored.held_value), LentModel(small.model, now)
        with dense.open(), pruned.open():
            report = repair(StoredRepair(dense, pruned, data, kept), layers, plan, damping)
        done = kept.rows()
        return {"refitted": {path: done[path] for path in layers if path in done}, "left": report["left"]}


class Repaired:
    """Refitted layers in a folder: one file of values each, and beside it how many rows they were fitted on.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def rows(self) -> dict[str, int]:
        """Layer -> rows of calibration data it saw, of those that are done."""
        found = [files.read_json(file) for file in sorted(self._folder.glob("*.json"))]
        return {row["layer"]: row["rows"] for row in found}

    def value(self, name: str) -> torch.Tensor | None:
        """The values of a parameter, if its layer is done."""
        path, _, key = name.rpartition(".")
        if not (self._folder / f"{path}.json").exists():
            return None
        place = shards.header(self._folder / f"{path}.safetensors").get(key)
        return None if place is None else read_place(place)

    def write(self, path: str, values: Mapping[str, torch.Tensor], rows: int) -> None:
        """Keep a layer: attribute -> values."""
        entries = {key: Entry(tag_of(t.dtype), tuple(t.shape)) for key, t in values.items()}
        stream_safetensors(
            self._folder / f"{path}.safetensors", entries, ((k, as_stored(t)) for k, t in values.items())
        )
        files.write_json(self._folder / f"{path}.json", {"layer": path, "rows": rows})  # last: it says that it is done


class StoredRepair(TorchRepair):
    """A torch model before and after its cut, both without values of their own, as compensation sees it.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        data: calibration batches.
        kept: what is done, and goes on to be.
    """

    def __init__(self, dense: LentModel, pruned: LentModel, data: Iterable[Any], kept: Repaired) -> None:
        super().__init__(dense.model, pruned.model, data)
        self._lent, self._kept, self._rows = pruned, kept, 0
        self._fits = False

    def values(self, path: str) -> tuple[Array, Array | None]:
        if not self._fits:  # asked for the size alone
            weight = bridge.get_module(self._pruned, path).weight
            outputs = weight.shape[self.made_axis(path)]
            return np.broadcast_to(np.zeros(()), (outputs, weight.numel() // outputs)), None
        self._lent.lend(path)
        return super().values(path)

    def stages(self, layers: Sequence[str], behind: Collection[str]) -> Iterator[RepairStage]:
        self._fits = True
        done = self._kept.rows()
        for stage in super().stages(layers, behind):
            left = [path for path in stage.layers if path not in done]
            yield _Counted(self, stage, left)

    def counting(self, calls: Generator[tuple[Array, Array], None, None]) -> Generator[tuple[Array, Array], None, None]:
        """Pass on what a layer is given, and count its rows."""
        self._rows = 0
        try:
            for given, wanted in calls:
                self._rows += len(given)
                yield given, wanted
        finally:
            calls.close()

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        self._lent.lend(path)
        super().write(path, weight, bias)
        module = bridge.get_module(self._pruned, path)
        values = {key: p.detach() for key, p in module._parameters.items() if p is not None}
        self._kept.write(path, values, self._rows)


class _Counted:
    """A stage without the layers that are done."""

    def __init__(self, models: StoredRepair, stage: RepairStage, layers: list[str]) -> None:
        self._models, self._stage, self.layers = models, stage, layers

    def calls(self, path: str) -> Generator[tuple[Array, Array], None, None]:
        """As the stage's own."""
        return self._models.counting(self._stage.calls(path))
