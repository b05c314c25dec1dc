"""The runner of a recipe: stages in order, each written whole before the next begins, so that a killed run resumes."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from slimkit.core import check
from slimkit.core.errors import ConfigError, FileFormatError, SlimkitError
from slimkit.core.files import atomic_directory, finite, read_json, write_json
from slimkit.core.jobs import factory
from slimkit.core.jobs.framework import JobResult
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.locks import locked
from slimkit.core.log import logger
from slimkit.core.run.checking import check_data, check_stages
from slimkit.core.run.language import Evaluation
from slimkit.core.run.recipe import RUN_FORMAT, Recipe, parse_recipe
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


@dataclass
class StageRecord:
    """What stage.json holds: how a finished stage went.

    Args:
        name: the stage's folder.
        kind: its kind in the recipe, "load" for the first.
        options: its options in the recipe.
        seed: the seed it began with.
        seconds: how long it took.
        facts: what it said about itself.
        curves: name -> values over the steps or epochs.
        measurement: what the model weighed afterwards.
        metrics: the recipe's metrics afterwards.
        digest: SHA-256 over the model's weights afterwards.
        files: file -> bytes, in the stage's folder.
        samples: what the recipe's function of that name gave: prompt -> the model's answer.
    """

    name: str
    kind: str
    options: dict[str, Any]
    seed: int
    seconds: float
    facts: dict[str, Any]
    curves: dict[str, list[float]]
    measurement: Measurement
    metrics: dict[str, float]
    digest: str
    files: dict[str, int]
    samples: dict[str, str] = field(default_factory=dict)


class RunFramework(Protocol):
    """What the runner asks of a framework; `core.run.stages` answers by what the jobs of each can do."""

    def seed(self, seed: int) -> None: ...

    def versions(self) -> dict[str, str]: ...

    def build(self, recipe: Recipe, folder: Path, edits: list[dict[str, Any]], example: Any) -> Any: ...

    def run(self, kind: str, options: Any, model: Any, context: StageContext) -> JobResult: ...

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

    def go(self) -> dict[str, Any]:
        with locked(self.output, "output", inside=True):
            check_stages(self.recipe, self.folder)
            self._open()
            # The same seed before each making, so that resuming meets the model and data the first run met.
            self.face.seed(self.recipe.seed)
            self.data = {} if self.recipe.data is None else factory.make(self.recipe.data, self.folder, "data")
            if self.recipe.data is None or self.recipe.calibrate or self.recipe.evaluate:
                self.data = self.face.prepare(self.recipe, self.folder, self.data)
            check_data(self.recipe, self.data)
            if self.recipe.evaluate:
                self.evaluation = self.face.evaluation(self.recipe, self.folder, self.data)
            for at, kind in enumerate(self.kinds):
                directory = self._directory(at)
                if (directory / "stage.json").exists():
                    self.records.append(_read_record(directory / "stage.json"))
                    self._same_start(at)
                    logger.info("%s: already done", directory.name)
                    continue
                self._stage(at, kind, directory)
                report = self._report()
            return report if self.model is not None else self._report()

    def _open(self) -> None:
        """Claim the folder: a fresh one, or one that holds an earlier part of this very run."""
        identity = {
            "format": RUN_FORMAT,
            "version": 1,
            "recipe": self.recipe.model_dump(mode="json"),
            "folder": str(self.folder.absolute()),
            "environment": environment(self.face.versions()),
        }
        marker = self.output / "run.json"
        if self.restart:
            shutil.rmtree(self.output / "stages", ignore_errors=True)
            marker.unlink(missing_ok=True)
        if marker.exists():
            earlier = read_json(marker, "run record")
            if (recipe := _of_today(earlier.get("recipe"))) != identity["recipe"]:
                changed = _first_difference(recipe, identity["recipe"])
                raise ConfigError(
                    f"output: {self.output} holds a run of another recipe (first difference: {changed}). "
                    "Choose another output, or pass --restart to throw that run away."
                )
        elif (self.output / "stages").exists():
            raise ConfigError(f"output: {self.output} has stages and no run.json; choose another output")
        # What a killed run left half written is hidden from readers, and goes now.
        for stale in (self.output / "stages").glob(".*.part") if (self.output / "stages").exists() else ():
            shutil.rmtree(stale, ignore_errors=True)
        write_json(marker, identity)
        self.environment = identity["environment"]

    def _seed(self, at: int) -> int:
        """Each stage has a seed of its own, so that it does not matter what ran before it in this process."""
        return (self.recipe.seed * 1000 + at) % 2**32 if at else self.recipe.seed

    def _directory(self, at: int) -> Path:
        return self.output / "stages" / f"{at:02d}-{self.kinds[at]}"

    def _same_start(self, at: int) -> None:
        """A resumed run must start from the model that the first one started from."""
        if at == 0:
            found = self.face.digest(self._restore(0))
            if found != self.records[0]["digest"]:
                raise ConfigError("model: the factory gives other weights than when this run began; pass --restart")

    def _restore(self, at: int) -> Any:
        """The model as it was after stage `at`, from the files."""
        self.face.seed(self.recipe.seed)
        if at == 0:
            return self.face.build(self.recipe, self.folder, [], self.data["example"])
        directory = self._directory(at)
        edits = read_json(directory / "structure.json", "structure")
        model = self.face.build(self.recipe, self.folder, edits, self.data["example"])
        self.face.load(model, directory / "model.safetensors")
        if self.face.digest(model) != self.records[at]["digest"]:
            raise FileFormatError(f"{directory / 'model.safetensors'} holds other weights than when the stage ended")
        return model

    def dense(self) -> Any:
        """The model before the first stage that shrinks it; made when first asked for."""
        if self._dense is None:
            self._dense = self._restore(self.dense_at)
        return self._dense

    def _earlier(self, at: int) -> dict[str, Callable[[], Any]]:
        """What makes the models between the dense one and stage `at`, for stages that changed it."""
        changed = [i for i in range(self.dense_at + 1, at) if self.kinds[i] not in LOOKING]
        return {self._directory(i).name: functools.partial(self._restore, i) for i in changed}

    def _stage(self, at: int, kind: str, directory: Path) -> None:
        key = f"stages[{at - 1}].{kind}" if at else "model"
        logger.info("%s: begins", directory.name)
        if self.model is None:
            self.model = self._restore(max(at - 1, 0))
        edits = read_json(self._directory(at - 1) / "structure.json", "structure") if at > 0 else []
        began = time.perf_counter()
        self.face.seed(self._seed(at))
        with atomic_directory(directory) as temporary:
            result = JobResult(self.model)
            if at:
                context = StageContext(
                    self.recipe, self.folder, self.data, list(edits), temporary, key, self.dense, self._seed(at),
                    self._earlier(at),
                )  # fmt: skip
                options = self.recipe.steps()[at - 1][1]
                try:
                    result = self.face.run(kind, options, self.model, context)
                except ConfigError:
                    raise
                except SlimkitError as error:
                    raise ConfigError(f"{key}: {error}") from error
                self.face.save(result.model, temporary / "model.safetensors")
            seconds = time.perf_counter() - began
            edits = [*edits, result.edit] if result.edit is not None else edits
            if kind in LOOKING:
                # The model is the one that the stage before it judged.
                last = self.records[-1]
                metrics, samples, measured = last["metrics"], last["samples"], last["measurement"]
            else:
                metrics, samples = self._metrics(result.model, at), self._samples(result.model)
                beside = self.dense() if at > self.dense_at else None
                measured = self.face.measure(result.model, self.data["example"], beside).to_dict()
            record = {
                "name": directory.name,
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
        self.records.append(record)
        logger.info("%s: done in %.1f s %s", directory.name, seconds, _short(metrics))

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
            "complete": len(self.records) == len(self.kinds),
            "stages": self.records,
        }
        write_report(report, self.output)
        return report


def _read_record(file: Path) -> dict[str, Any]:
    """A finished stage's record; FileFormatError names what is missing or of another kind."""
    from pydantic import TypeAdapter, ValidationError

    record = read_json(file, "stage record")
    try:
        TypeAdapter(StageRecord).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{file} is damaged: {place}: {first['msg']}") from None
    found: dict[str, Any] = record
    return found


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """Where a run took place: Python, platform, processor count, and the versions of what it used."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "versions": dict(versions),
    }


def _of_today(recipe: Any) -> Any:
    """A recipe that an earlier version kept, with the options that came since at their defaults."""
    try:
        return parse_recipe(recipe).model_dump(mode="json")
    except (ConfigError, TypeError, ValueError):  # an option that went, or a file that is no recipe: told below
        return recipe


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list):
        for at, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return _first_difference(a, b, f"{path}[{at}]")
    return path or "recipe"


def _short(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
