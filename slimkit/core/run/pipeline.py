"""The runner of a recipe: stages in order, each written whole before the next begins, so that a killed run resumes."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from slimkit.core import check
from slimkit.core.errors import ConfigError, FileFormatError, SlimkitError
from slimkit.core.files import atomic_directory, finite, read_json, write_json
from slimkit.core.joblog import JobLog
from slimkit.core.jobs import crew, factory
from slimkit.core.jobs.framework import JobResult
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.locks import locked
from slimkit.core.log import logger
from slimkit.core.run.checking import check_data, check_stages, read_alike
from slimkit.core.run.language import Evaluation
from slimkit.core.run.recipe import RUN_FORMAT, Recipe
from slimkit.core.run.records import environment, first_difference, of_today, read_record
from slimkit.core.run.report import write_report

SHRINKING = ("prune", "cut", "sparsify")
# Stages that leave the model as it is.
LOOKING = ("export", "compare")


@dataclass
class StageContext:
    """What a stage may ask for.

    Args:
        recipe: the whole recipe.
        folder: the recipe's folder, where factory references are looked up.
        data: what the recipe's data factory returned.
        edits: structural edits that lead from a fresh model to the present one, oldest first.
        directory: where the stage writes its files.
        key: the stage's place in the recipe, for messages ("stages[2].prune").
        dense: makes the dense model: the one before the first stage that shrinks it.
        seed: of everything the stage draws.
        earlier: stage -> function that makes the model as it was after it, for each stage that changed it since.
    """

    recipe: Recipe
    folder: Path
    data: Mapping[str, Any]
    edits: list[dict[str, Any]]
    directory: Path
    key: str
    dense: Any
    seed: int = 0
    earlier: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


class RunFramework(crew.CrewFramework, Protocol):
    """What the runner asks of a framework; `core.run.stages` answers by what the jobs of each can do."""

    def seed(self, seed: int) -> None: ...

    def versions(self) -> dict[str, str]: ...

    def build(self, recipe: Recipe, folder: Path, edits: list[dict[str, Any]], example: Any) -> Any: ...

    def run(self, kind: str, options: Any, model: Any, context: StageContext) -> JobResult: ...

    def spreads(self, kind: str, options: Any, data: Mapping[str, Any]) -> bool:
        """Whether several processes do this stage together; otherwise the first does it while they wait."""
        return False

    def measure(self, model: Any, example: Any, dense: Any = None) -> Measurement: ...

    def save(self, model: Any, file: Path) -> None: ...

    def load(self, model: Any, file: Path) -> None: ...

    def digest(self, model: Any) -> str: ...

    def prepare(self, recipe: Recipe, folder: Path, data: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def evaluation(self, recipe: Recipe, folder: Path, data: Mapping[str, Any]) -> Evaluation | None: ...


def run_recipe(
    recipe: Recipe,
    folder: Path,
    face: RunFramework,
    output: Path,
    *,
    restart: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Run a recipe's stages, or what is left of them.

    Under torchrun every process makes the same call. Stages that train, and sparsify on calibration data, are done by
    all of them; the others by the first, which alone writes.

    Args:
        recipe: the checked recipe.
        folder: the recipe's folder.
        face: the framework that does the work.
        output: the run's folder; stages/, report.html and report.json appear in it.
        restart: throw away an earlier run in that folder instead of resuming it.
        command: the command line that asked for it, which the report shows.

    Returns:
        The report, as written to report.json.

    Raises:
        SlimkitError: something in the recipe or the folder is wrong; the message names the key or the file.
    """
    return _Run(recipe, Path(folder), face, Path(output), restart, command).go()


class _Run:
    """One run in one folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, face: RunFramework, output: Path, restart: bool, command: str | None
    ) -> None:
        self.recipe, self.folder, self.face, self.output = recipe, folder, face, output
        self.restart, self.command = restart, command
        self.kinds = ["load", *(kind for kind, _ in recipe.steps())]
        shrinks = [i for i, kind in enumerate(self.kinds) if kind in SHRINKING]
        self.dense_at = (shrinks[0] if shrinks else len(self.kinds)) - 1
        self.records: list[dict[str, Any]] = []
        self.model: Any = None
        self._dense: Any = None
        self.evaluation: Evaluation | None = None
        self._log = JobLog(output / "stages")

    def go(self) -> dict[str, Any]:
        self.face.join()
        first = crew.rank() == 0
        with locked(self.output, "output", inside=True) if first else contextlib.nullcontext():
            check_stages(self.recipe, self.folder)
            self.environment = environment(self.face.versions())
            self.face.once(self._open)
            try:
                return self._go()
            except BaseException as error:
                if first and not self._is_whole():
                    self._log.stopped(error)
                raise

    def _go(self) -> dict[str, Any]:
        self.data = self.face.in_turn(self._read)
        check_data(self.recipe, self.data)
        self.face.agree("data", read_alike(self.recipe, self.data))
        if self.recipe.evaluate:
            self.evaluation = self.face.evaluation(self.recipe, self.folder, self.data)
        report = None
        for at, kind in enumerate(self.kinds):
            directory = self._directory(at)
            found = self.face.once(functools.partial(self._found, at))
            if found is not None:
                self.records.append(found)
                logger.info("%s: already done", directory.name)
                continue
            if at and crew.size() > 1 and self.face.spreads(kind, self.recipe.steps()[at - 1][1], self.data):
                record = self._stage(at, kind, directory, True)
            else:
                record = self.face.once(functools.partial(self._stage, at, kind, directory))
                self.model = self.model if crew.rank() == 0 else None  # the others' is not this stage's
            self.records.append(record)
            if crew.rank() == 0:
                self._log.note("stage", stage=directory.name, done=at, total=len(self.kinds) - 1)
            logger.info("%s: done in %.1f s %s", directory.name, record["seconds"], _short(record["metrics"]))
            report = self.face.once(self._report)
        return report if report is not None else self.face.once(self._report)

    def _read(self) -> Mapping[str, Any]:
        # The same seed before each making, so that resuming meets the model and data the first run met.
        self.face.seed(self.recipe.seed)
        data = {} if self.recipe.data is None else factory.make(self.recipe.data, self.folder, "data")
        if self.recipe.data is None or self.recipe.calibrate or self.recipe.evaluate:
            data = self.face.prepare(self.recipe, self.folder, data)
        return data

    def _found(self, at: int) -> dict[str, Any] | None:
        """The record of a stage that is done."""
        file = self._directory(at) / "stage.json"
        if not file.exists():
            return None
        record = read_record(file)
        if at == 0:  # a resumed run must start from the model that the first one started from
            self._like(self._restore(0), record)
        return record

    def _is_whole(self) -> bool:
        return len(self.records) == len(self.kinds)

    def _open(self) -> None:
        """Claim the folder: a fresh one, or one that holds an earlier part of this very run."""
        identity = {
            "format": RUN_FORMAT,
            "version": 1,
            "recipe": self.recipe.model_dump(mode="json"),
            "folder": str(self.folder.absolute()),
            "environment": self.environment,
        }
        marker, stages = self.output / "run.json", self.output / "stages"
        if self.restart:
            shutil.rmtree(stages, ignore_errors=True)
            marker.unlink(missing_ok=True)
        if marker.exists():
            earlier = read_json(marker, "run record")
            if (recipe := of_today(earlier.get("recipe"))) != identity["recipe"]:
                changed = first_difference(recipe, identity["recipe"])
                raise ConfigError(
                    f"output: {self.output} holds a run of another recipe (first difference: {changed}). "
                    "Choose another output, or pass --restart to throw that run away."
                )
        elif stages.exists():
            raise ConfigError(f"output: {self.output} has stages and no run.json; choose another output")
        # What a killed run left half written is hidden from readers, and goes now.
        for stale in stages.glob(".*.part") if stages.exists() else ():
            shutil.rmtree(stale, ignore_errors=True)
        write_json(marker, identity)
        stages.mkdir(exist_ok=True)
        self._log.begun(f"the recipe {self.recipe.name!r}", processes=crew.size())

    def _seed(self, at: int) -> int:
        """Each stage has a seed of its own, so that it does not matter what ran before it in this process."""
        return (self.recipe.seed * 1000 + at) % 2**32 if at else self.recipe.seed

    def _directory(self, at: int) -> Path:
        return self.output / "stages" / f"{at:02d}-{self.kinds[at]}"

    def _restore(self, at: int) -> Any:
        """The model as it was after stage `at`, from the files."""
        if at == 0:
            model = self._built([])
            if self.records:
                self._like(model, self.records[0])
            return model
        directory = self._directory(at)
        model = self._built(read_json(directory / "structure.json", "structure"), directory / "model.safetensors")
        if self.face.digest(model) != self.records[at]["digest"]:
            raise FileFormatError(f"{directory / 'model.safetensors'} holds other weights than when the stage ended")
        return model

    def _built(self, edits: list[dict[str, Any]], weights: Path | None = None) -> Any:
        """A fresh model with these edits, and the weights of a file."""
        self.face.seed(self.recipe.seed)
        model = self.face.build(self.recipe, self.folder, edits, self.data["example"])
        if weights is not None:
            self.face.load(model, weights)
        return model

    def _like(self, model: Any, record: Mapping[str, Any]) -> None:
        """Refuse a model that is not the one a run began with."""
        if self.face.digest(model) != record["digest"]:
            raise ConfigError("model: the factory gives other weights than when this run began; pass --restart")

    def dense(self) -> Any:
        """The model before the first stage that shrinks it; made when first asked for."""
        if self._dense is None:
            self._dense = self._restore(self.dense_at)
        return self._dense

    def _lent(self) -> Any:
        """The dense model for a stage that shares it out among processes, in place."""
        model, self._dense = self.dense(), None
        return model

    def _earlier(self, at: int) -> dict[str, Callable[[], Any]]:
        """What makes the models between the dense one and stage `at`, for stages that changed it."""
        changed = [i for i in range(self.dense_at + 1, at) if self.kinds[i] not in LOOKING]
        return {self._directory(i).name: functools.partial(self._restore, i) for i in changed}

    def _stage(self, at: int, kind: str, directory: Path, together: bool = False) -> dict[str, Any]:
        """Do a stage and write it; its record. `together`: every process does, and the first writes."""
        key = f"stages[{at - 1}].{kind}" if at else "model"
        logger.info("%s: begins", directory.name)
        if self.model is None:
            self.model = self._restore(max(at - 1, 0))
        edits = read_json(self._directory(at - 1) / "structure.json", "structure") if at > 0 else []
        began = time.perf_counter()
        self.face.seed(self._seed(at))
        once = self.face.once if together else _at_once
        with crew.result(directory) if together else atomic_directory(directory) as temporary:
            result = JobResult(self.model)
            if at:
                context = StageContext(
                    self.recipe, self.folder, self.data, list(edits), temporary, key,
                    self._lent if together else self.dense, self._seed(at), self._earlier(at),
                )  # fmt: skip
                options = self.recipe.steps()[at - 1][1]
                try:
                    result = self.face.run(kind, options, self.model, context)
                except ConfigError:
                    raise
                except SlimkitError as error:
                    raise ConfigError(f"{key}: {error}") from error
            self.model = None

            def write() -> dict[str, Any]:
                return self._written(at, kind, result, edits, temporary, began, together)

            record: dict[str, Any] = once(write)
        once(lambda: None)  # it is in its place, where the others may read it
        return record

    def _written(
        self, at: int, kind: str, result: JobResult, edits: list[Any], temporary: Path, began: float, together: bool
    ) -> dict[str, Any]:
        """Write what a stage made; its record."""
        edits = [*edits, result.edit] if result.edit is not None else edits
        if at:
            self.face.save(result.model, temporary / "model.safetensors")
        if together:  # what was put together of parts is judged as it will be restored
            result.model = self._built(edits, temporary / "model.safetensors")
        seconds = time.perf_counter() - began
        if kind in LOOKING:
            # The model is the one that the stage before it judged.
            last = self.records[-1]
            metrics, samples, measured = last["metrics"], last["samples"], last["measurement"]
        else:
            metrics, samples = self._metrics(result.model, at), self._samples(result.model)
            beside = self.dense() if at > self.dense_at else None
            measured = self.face.measure(result.model, self.data["example"], beside).to_dict()
        record = {
            "name": self._directory(at).name,
            "kind": kind,
            "options": self.recipe.steps()[at - 1][1].model_dump(mode="json") if at else {},
            "seed": self._seed(at),
            "seconds": round(seconds, 3),
            "facts": result.facts,
            "curves": result.curves,
            "measurement": measured,
            "metrics": metrics,
            "samples": samples,
            "digest": self.face.digest(result.model),
            "files": {
                f.relative_to(temporary).as_posix(): f.stat().st_size
                for f in sorted(temporary.rglob("*"))
                if f.is_file()
            },
        }
        record = finite(record)  # one loss that is NaN does not end the run
        write_json(temporary / "structure.json", edits)
        write_json(temporary / "stage.json", record)
        self.model = result.model
        return record

    def _metrics(self, model: Any, at: int) -> dict[str, float]:
        told = {}
        if self.evaluation is not None:
            told = self.evaluation.figures(model, None if at <= self.dense_at else self.dense)
        if self.recipe.metrics is None:
            return told
        # Up to the dense stage the model is its own yardstick.
        dense = model if at <= self.dense_at else self.dense()
        found = factory.make(self.recipe.metrics, self.folder, "metrics", model, self.data, dense)
        if not isinstance(found, Mapping):
            raise ConfigError(f"metrics: must return a mapping of numbers. Received: {type(found).__name__}")
        return {**told, **{str(k): check.number(v, f"metrics[{k!r}]") for k, v in found.items()}}

    def _samples(self, model: Any) -> dict[str, str]:
        if self.recipe.samples is None:
            return {}
        found = factory.make(self.recipe.samples, self.folder, "samples", model, self.data)
        if not isinstance(found, Mapping) or not all(isinstance(v, str) for v in found.values()):
            raise ConfigError("samples: must return a mapping of prompts to the texts that the model answers")
        return {str(k): v for k, v in found.items()}

    def _report(self) -> dict[str, Any]:
        report = {
            "format": "slimkit-report",
            "version": 1,
            "name": self.recipe.name,
            "title": self.recipe.title or self.recipe.name,
            "recipe": self.recipe.model_dump(mode="json"),
            "environment": self.environment,
            "output": str(self.output),
            "command": self.command,
            "seed": self.recipe.seed,
            "dense": min(self.dense_at, len(self.records) - 1),
            "complete": self._is_whole(),
            "stages": self.records,
        }
        write_report(report, self.output)
        return report


def _short(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())


def _at_once(work: Callable[[], Any]) -> Any:
    """What one process does."""
    return work()
