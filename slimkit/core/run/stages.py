"""A recipe's stages on a framework's jobs: what a recipe gives each, and how a stopped run gets its model back."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.jobs import crew, factory, fitting, pruning, work
from slimkit.core.jobs.framework import ComputeLoss, JobFramework, JobResult, Opened
from slimkit.core.jobs.measurement import Measurement, show
from slimkit.core.jobs.options import (
    AdaptOptions,
    CompareOptions,
    CutOptions,
    DistillOptions,
    ExportOptions,
    FitOptions,
    TrainOptions,
)
from slimkit.core.jobs.sources import ModelPlace
from slimkit.core.onnxfile import onnx_latency
from slimkit.core.run import language
from slimkit.core.run.pipeline import StageContext
from slimkit.core.run.recipe import Recipe
from slimkit.core.train.loading import is_samples

# A reloaded delta must answer like the trained one; float32 sums in the same order leave no more than this.
_RELOAD_TOLERANCE = 1e-5


class RecipeContext(work.JobContext):
    """A stage as its job sees it.

    Args:
        face: the framework.
        stage: what the runner gives a stage.
    """

    def __init__(self, face: JobFramework, stage: StageContext) -> None:
        super().__init__(face, stage.seed, stage.data["example"])
        self.stage = stage
        self.shares = False  # whether each process gets every n-th calibration batch

    def spell(self, key: str) -> str:
        return f"{self.stage.key}.{key}"

    def function(self, reference: str, key: str) -> Callable[..., Any]:
        return factory.resolve(reference, self.stage.folder, self.spell(key))

    def file(self, name: str) -> Path:
        return self.stage.folder / name

    def calibration(self, count: int | None = None) -> list[Any]:
        batches = self.stage.data.get("calibration")
        if not batches:
            raise ConfigError(
                f"{self.stage.key}: needs calibration batches; the data factory returned no key 'calibration'"
            )
        found = list(batches)[:count]
        return found[crew.rank() :: crew.size()] if self.shares else found

    @property
    def has_data(self) -> bool:
        return bool(self.stage.data.get("calibration"))

    def tokenizer(self, folder: str | None) -> Any:
        if folder is not None:
            return self.stage.folder / folder
        return language.tokenizer_of(self.stage.recipe, self.stage.folder, self.face, self.spell("settings"))

    def lessons(self, count: int, size: int) -> list[Any]:
        samples = self._training
        if is_samples(samples):
            raise ConfigError(
                f"{self.stage.key}: a start that is read from data wants ready batches: let the data factory return a "
                f"list of (inputs, labels), or a loader"
            )
        return list(islice(iter(samples), count))

    @property
    def _training(self) -> Any:
        data = self.stage.data
        return data.get(self.stage.key.rpartition(".")[2], data["train"])

    def loss(self, asked: Any) -> tuple[str, ComputeLoss]:
        reference: factory.Factory | str = self.stage.recipe.loss if asked is None else asked
        if isinstance(reference, str) and reference in self.face.losses:
            return reference, work.named_loss(self.face, reference, self.spell)
        function = factory.resolve(reference, self.stage.folder, "loss" if asked is None else self.spell("loss"))
        name, arguments = factory.parts(reference)
        return name, lambda model, batch: function(model, batch, **arguments)

    def fit(self, model: Any, options: FitOptions, loss: ComputeLoss) -> dict[str, Any]:
        return fitting.fit(self.face, model, options, self._training, loss, seed=self.seed, spell=self.spell)


class Stages(crew.CrewFramework):
    """A framework's jobs as the runner of recipes asks for them (`pipeline.RunFramework`).

    Args:
        face: the framework.
    """

    def __init__(self, face: JobFramework) -> None:
        self.face = face

    def join(self) -> None:
        """Join the other processes of the run."""
        self.face.join()

    def once(self, work: Callable[[], Any]) -> Any:
        """What the first process does alone; all get its result, or its error."""
        return self.face.once(work)

    def each(self, value: Any) -> list[Any]:
        """A plain value of every process."""
        return self.face.each(value)

    def agree(self, what: str, batches: Sequence[Any]) -> None:
        """Refuse batches that are not the same in every process."""
        self.face.agree(what, batches)

    def spreads(self, kind: str, options: Any, data: Mapping[str, Any]) -> bool:
        """Whether all processes do a stage: they train together, and each calibrates with its share of the batches.

        Ratios that are measured depend on how the batches are shared out, so the first process finds them alone.
        """
        if kind != "sparsify":
            return isinstance(options, FitOptions)
        config = options.build()
        batches = list(data.get("calibration") or ())[: options.calibration_batches]
        return bool(config.needs_data and config.allocation is None and len(batches) >= crew.size())

    def seed(self, seed: int) -> None:
        """Seed Python, NumPy and the framework."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.face.seed_framework(seed)

    def versions(self) -> dict[str, str]:
        """The versions that a result may depend on."""
        return {
            "slimkit": self.face.slim.__version__, **self.face.framework_versions(), "numpy": np.__version__
        }  # fmt: skip

    def build(self, made: Recipe, folder: Path, edits: list[dict[str, Any]], example: Any) -> Any:
        """A fresh model with the structural edits of earlier stages replayed on it, weights not yet loaded."""
        for edit in edits if isinstance(edits, list) else [edits]:
            if not isinstance(edit, dict) or len(edit) != 1 or not {"cut", "prune", "sparse", "adapt"} >= set(edit):
                raise FileFormatError("structure.json must be a list of edits, each a cut, prune, sparse or adapt")
        cuts = [i for i, edit in enumerate(edits) if "cut" in edit]
        arguments = edits[cuts[-1]]["cut"] if cuts else {}
        place = language.model_folder(made, folder)
        if place is not None:
            model = self.face.open(ModelPlace(place)).model
        else:
            model = self.face.check_model(factory.make(made.model, folder, "model", **arguments))
        for edit in edits[cuts[-1] + 1 :] if cuts else edits:
            if "prune" in edit:
                self.face.slim.Pruner(model, example).prune_by_desc(edit["prune"], weights_follow=True)
            elif "sparse" in edit:
                self.face.record_zeros(model, edit["sparse"])
            else:
                work.put_on(self.face, model, edit["adapt"], example)
        return model

    def measure(self, model: Any, example: Any, dense: Any = None) -> Measurement:
        """Parameters, zeros, MACs and latency."""
        return self.face.measure(model, example, dense)

    def save(self, model: Any, file: Path) -> None:
        """All parameters and buffers as safetensors."""
        self.face.slim.save_checkpoint(model, file)

    def load(self, model: Any, file: Path) -> None:
        """Take back what `save` wrote, strictly, in place."""
        self.face.slim.load_checkpoint(file, model, strict_load=True)

    def digest(self, model: Any) -> str:
        """SHA-256 over all parameters and buffers."""
        return work.digest(self.face, model)

    def run(self, kind: str, options: Any, model: Any, stage: StageContext) -> JobResult:
        """Run one stage on the model."""
        context = RecipeContext(self.face, stage)
        if kind == "cut":
            return self._cut(options, model, context)
        if kind == "adapt":
            return self._adapt(options, model, context)
        if isinstance(options, FitOptions):
            return self._trained(options, model, context)
        if kind == "export":
            return self._export(options, model, stage)
        if kind == "compare":
            return self._compare(options, model, stage)
        if kind == "prune":
            return pruning.prune(model, options, context)
        context.shares = self.spreads(kind, options, stage.data)
        return work.sparsify(model, options, context)

    def prepare(self, recipe: Recipe, folder: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The data with what the recipe's text adds."""
        return language.prepared(recipe, folder, self.face, data)

    def evaluation(self, recipe: Recipe, folder: Path, data: Mapping[str, Any]) -> language.Evaluation | None:
        """What judges the stages on held-out text."""
        return language.evaluation(recipe, folder, self.face, data)

    def _compare(self, options: CompareOptions, model: Any, stage: StageContext) -> JobResult:
        """The models of the run since the dense one, the present one last, as JSON and as a page."""
        if not stage.earlier:
            raise ConfigError(f"{stage.key}: no stage before it changed the dense model")
        *_, last = stage.earlier
        candidates = {**stage.earlier, last: model}
        found = language.compared(
            self.face, stage.dense, candidates, options, stage.recipe, stage.data, stage.key, stage.seed
        )
        found.save(stage.directory / "comparison.json")
        found.save_html(stage.directory / "comparison.html", stage.recipe.title or stage.recipe.name)
        facts = {"headline": found.headline(last), "comparison": found.to_dict()}
        return JobResult(model, facts=facts)

    def _shared(self, model: Any) -> Opened:
        """A model of which each process holds a part from here on, in place, where there are several."""
        opened = Opened(model, ModelPlace(factory="the recipe's"))
        self.face.share(opened)
        return opened

    def _trained(self, options: FitOptions, model: Any, context: RecipeContext) -> JobResult:
        """Train, or distil the dense model into this one; the whole of it is in the first process afterwards."""
        teacher = context.stage.dense() if isinstance(options, DistillOptions) else None
        opened = self._shared(model)
        if isinstance(options, DistillOptions):
            done = work.distill(self._shared(teacher).model, model, options, context)
        else:
            assert isinstance(options, TrainOptions)
            done = work.train(model, options, context)
        self.face.gather(opened)
        if crew.size() > 1:
            done.model = opened.model
        return done

    def _cut(self, options: CutOptions, model: Any, context: RecipeContext) -> JobResult:
        stage = context.stage
        arguments = {**factory.parts(stage.recipe.model)[1], **options.arguments}
        small = self.build(stage.recipe, stage.folder, [{"cut": arguments}], stage.data["example"])
        if options.weights is None:
            source = stage.directory / "before.safetensors"
            self.save(model, source)
        else:
            source = Path(factory.make(options.weights, stage.folder, f"{stage.key}.weights"))
        done = work.cut(small, source, options, context, model)
        for leftover in stage.directory.glob("before.safetensors*"):
            leftover.unlink()
        done.edit = {"cut": arguments}
        return done

    def _adapt(self, options: AdaptOptions, model: Any, context: RecipeContext) -> JobResult:
        """The job, and the proof that its file makes the same model again."""
        stage, face = context.stage, self.face
        put_back = face.snapshot(model)
        teacher = self._shared(stage.dense()).model if options.distill_weight else None
        self._shared(model)
        done = work.adapt(model, options, context, teacher)
        face.slim.save_delta(model, stage.directory / "delta")
        answers = face.outputs(model, context.example)
        if crew.rank() > 0:
            return done
        fresh = self.build(stage.recipe, stage.folder, stage.edits, context.example)
        put_back(fresh)
        # Which modules number the positions stands in no file.
        told = {"positions": options.settings["positions"]} if "positions" in options.settings else {}
        face.slim.load_delta(fresh, stage.directory / "delta", **told)
        if crew.size() > 1:  # the trained one is in parts
            done.model = fresh
        gap = work.largest_gap(answers, face.outputs(fresh, context.example))
        if not gap <= _RELOAD_TOLERANCE:
            raise ConfigError(f"{stage.key}: the reloaded delta answers differently, by {gap:.3g}")
        size = sum(f.stat().st_size for f in (stage.directory / "delta").rglob("*") if f.is_file())
        done.facts |= {
            "headline": f"{done.facts['trained_share']:.2%} of the parameters trained; delta of "
            f"{show(size, 'bytes')}, reloaded on a fresh model with a largest difference of {gap:.2g}",
            "delta_bytes": size,
            "reload_difference": gap,
        }
        return done

    def _export(self, options: ExportOptions, model: Any, stage: StageContext) -> JobResult:
        """One file a format; ONNX also beside the dense model's, both timed."""
        files = ("onnx", "mindir")
        wanted = options.formats or [form for form in self.face.formats if form in files]
        example, folder = stage.data["example"], language.model_folder(stage.recipe, stage.folder)
        place = ModelPlace(factory="the recipe's") if folder is None else ModelPlace(folder)
        facts: dict[str, Any] = {}
        said: list[str] = []

        def write(which: Any, name: str, form: str) -> dict[str, Any]:
            inputs = RecipeContext(self.face, stage).calibration() if form == "w8a8s" else example
            return self.face.export(Opened(which, place), inputs, stage.directory / name, form, options.build(form))

        for form in wanted:
            if form not in self.face.formats:
                raise ConfigError(f"{stage.key}.formats: {form} is MindSpore's; this recipe runs in torch")
            written = write(model, f"model.{form}", form)
            facts[form] = {**written, "path": f"model.{form}"}
            if form == "w8a8s":
                said.append(f"{len(written['layers'])} int8 layers, {len(written['kept_float'])} left float16")
                continue
            opset = f"opset {written['opset']}, " if form == "onnx" else "MINDIR "
            said.append(f"{opset}within {written['max_difference']:.1e} of the model")
            if form == "onnx" and options.compare_dense:
                write(stage.dense(), "dense.onnx", form)
                paths = {"dense": stage.directory / "dense.onnx", "final": stage.directory / "model.onnx"}
                times = onnx_latency(paths, dict(zip(written["inputs"], self.face.arrays(example))))
                facts["latency_ms"], facts["latency_ratio"] = times, times["dense"] / times["final"]
                said.append(
                    f"{times['dense']:.3f} ms dense, {times['final']:.3f} ms now in onnxruntime on one thread: "
                    f"{facts['latency_ratio']:.2f} times as fast"
                )
        return JobResult(model, facts={"headline": "; ".join(said), **facts})
