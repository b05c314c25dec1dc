"""What each stage of a recipe does to a model of either framework, through the public names of its package."""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.files import digest_array
from slimkit.core.onnxfile import OnnxReport, onnx_latency
from slimkit.core.run import factory, recipe
from slimkit.core.run.measurement import Measurement, show
from slimkit.core.run.pipeline import StageContext, StageResult, digest_mapping
from slimkit.core.run.recipe import Recipe
from slimkit.core.sparse import SparseConfig
from slimkit.core.weights.blocks import PruneConfig

# A reloaded delta must answer like the trained one; float32 sums in the same order leave no more than this.
_RELOAD_TOLERANCE = 1e-5

Array = np.ndarray[Any, Any]
ComputeLoss = Callable[[Any, Any], Any]


class Stages(ABC):
    """A framework's answers to the runner of recipes (`pipeline.Wing`), but for what it alone knows."""

    # The package whose public names do the work.
    slim: Any
    # What an export stage writes when the recipe does not say.
    formats: tuple[str, ...] = ("onnx",)

    # What a wing adds.

    @abstractmethod
    def seed_framework(self, seed: int) -> None:
        """Seed the framework's own random numbers."""

    @abstractmethod
    def framework_versions(self) -> dict[str, str]:
        """The framework's name and version."""

    @abstractmethod
    def check_model(self, model: Any) -> Any:
        """Refuse anything but a model of this framework."""

    @abstractmethod
    def measure(self, model: Any, example: Any) -> Measurement:
        """Parameters, zeros, MACs and latency."""

    @abstractmethod
    def states(self, model: Any) -> Iterator[tuple[str, str, Array]]:
        """Every parameter and buffer as (name, dtype and shape, raw values)."""

    @abstractmethod
    def sizes(self, model: Any) -> list[tuple[int, bool]]:
        """Every parameter once as (number of entries, whether it trains)."""

    @abstractmethod
    def snapshot(self, model: Any) -> Callable[[Any], None]:
        """Keep all weights; returns what puts them into a model of the same structure."""

    @abstractmethod
    def outputs(self, model: Any, example: Any) -> list[Array]:
        """The arrays that a model answers with in eval mode."""

    @abstractmethod
    def fit(self, model: Any, options: recipe.Training, train_data: Any, loss: ComputeLoss) -> Any:
        """Train the parameters that want a gradient; returns the run history."""

    @abstractmethod
    def statistics_held(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Training mode, but for norms with running statistics: a delta does not carry what they learn."""

    @abstractmethod
    def named_loss(self, name: str) -> ComputeLoss | None:
        """f(model, (inputs, targets)) for a loss that the framework has by that name."""

    @abstractmethod
    def soft_loss(self, dual: Any, batch: Any) -> Any:
        """The distillation loss of the two models on one batch of inputs."""

    @abstractmethod
    def arrays(self, example: Any) -> list[Array]:
        """The arrays of an example, in the order of the inputs of the ONNX files that the package writes."""

    # What the runner calls.

    def seed(self, seed: int) -> None:
        """Seed Python, NumPy and the framework."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.seed_framework(seed)

    def versions(self) -> dict[str, str]:
        """The versions that a result may depend on."""
        return {"slimkit": self.slim.__version__, **self.framework_versions(), "numpy": np.__version__}

    def build(self, made: Recipe, folder: Path, edits: list[dict[str, Any]], example: Any) -> Any:
        """A fresh model with the structural edits of earlier stages replayed on it, weights not yet loaded."""
        for edit in edits if isinstance(edits, list) else [edits]:
            if not isinstance(edit, dict) or len(edit) != 1 or not {"cut", "prune", "adapt"} >= set(edit):
                raise FileFormatError("structure.json must be a list of edits, each a cut, prune or adapt")
        cuts = [i for i, edit in enumerate(edits) if "cut" in edit]
        arguments = edits[cuts[-1]]["cut"] if cuts else {}
        model = self.check_model(factory.make(made.model, folder, "model", **arguments))
        for edit in edits[cuts[-1] + 1 :] if cuts else edits:
            if "prune" in edit:
                self.slim.Pruner(model, example).prune_by_desc(edit["prune"])
            else:
                self.slim.apply_delta(model, **edit["adapt"])
        return model

    def run(self, kind: str, options: Any, model: Any, context: StageContext) -> StageResult:
        """Run one stage on the model."""
        found: StageResult = getattr(self, f"_{kind}")(options, model, context)
        return found

    def save(self, model: Any, file: Path) -> None:
        """All parameters and buffers as safetensors."""
        self.slim.save_checkpoint(model, file)

    def load(self, model: Any, file: Path) -> None:
        """Take back what `save` wrote, strictly, in place."""
        self.slim.load_checkpoint(file, model, strict_load=True)

    def digest(self, model: Any) -> str:
        """SHA-256 over all parameters and buffers."""
        return digest_mapping({name: f"{kind}{digest_array(raw)}" for name, kind, raw in self.states(model)})

    # The stages.

    def _fit(
        self, model: Any, options: recipe.Training, context: StageContext, loss: ComputeLoss
    ) -> dict[str, list[float]]:
        """Train the parameters that want a gradient; returns the loss of each epoch and update."""
        if not any(trains for _, trains in self.sizes(model)):
            raise ConfigError(f"{context.key}: no parameter of the model is trainable")
        history = self.fit(model, options, context.data["train"], loss)
        return {
            "loss": [float(v) for v in history.get_metric_values("train_loss_epoch")],
            "loss_by_step": [float(v) for v in history.get_metric_values("train_loss_step")],
        }

    def _loss(self, options: recipe.Training, context: StageContext) -> ComputeLoss:
        """The task's loss as f(model, batch)."""
        reference = options.loss or context.recipe.loss
        if isinstance(reference, str) and (named := self.named_loss(reference)) is not None:
            return named
        function = factory.resolve(reference, context.folder, "loss")
        arguments = reference.arguments if isinstance(reference, factory.Factory) else {}
        return lambda model, batch: function(model, batch, **arguments)

    def _count(self, model: Any) -> int:
        return sum(size for size, _ in self.sizes(model))

    def _train(self, options: recipe.TrainOptions, model: Any, context: StageContext) -> StageResult:
        keeper: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if options.keep_zeros:
            keeper = self.slim.freeze_zeros(model)
        with keeper:
            curves = self._fit(model, options, context, self._loss(options, context))
        loss = curves["loss"]
        said = f"{_epochs(options)}, loss {loss[0]:.4g} to {loss[-1]:.4g}" if loss else _epochs(options)
        return StageResult(
            model, facts={"headline": said + (", zeros kept" if options.keep_zeros else "")}, curves=curves
        )

    _finetune = _train

    def _calibration(self, context: StageContext, count: int) -> list[Any]:
        batches = context.data.get("calibration")
        if not batches:
            raise ConfigError(
                f"{context.key}: needs calibration batches; the data factory returned no key 'calibration'"
            )
        return list(batches)[:count]

    def _prune(self, options: recipe.PruneOptions, model: Any, context: StageContext) -> StageResult:
        before = self._count(model)
        measured = self._calibration(context, options.calibration_batches) if options.calibration_batches else None
        pruner = (
            self.slim.Pruner(model, context.data["example"])
            .set_importance_evaluation_function(options.importance, calibration=measured)
            .set_node_reserved_ratio(options.node_reserved_ratio)
            .set_alignment(options.alignment)
            .set_budget(options.budget)
        )
        if options.compensation_batches:
            pruner.set_compensation(self._calibration(context, options.compensation_batches))
        desc = pruner.prune(options.reserved_ratio, un_prune_list=options.un_prune_list)
        after = self._count(model)
        said = f"{show(before, 'count')} to {show(after, 'count')} parameters: {after / before:.3f} kept"
        if options.budget == "params":
            said += f", {options.reserved_ratio} asked for"
        else:
            said += f"; {pruner.report()['reached']:.3f} of the MACs, {options.reserved_ratio} asked for"
        facts = {
            "headline": said,
            "report": pruner.report(),
        }
        return StageResult(model, edit={"prune": desc}, facts=facts)

    def _cut(self, options: recipe.CutOptions, model: Any, context: StageContext) -> StageResult:
        given = context.recipe.model
        arguments = {**(given.arguments if isinstance(given, factory.Factory) else {}), **options.arguments}
        small = self.build(context.recipe, context.folder, [{"cut": arguments}], context.data["example"])
        config = PruneConfig().set_steps(options.steps).set_selection(options.selection)
        if options.pattern is not None and options.layers is not None:
            config.add_blocks_params(options.pattern, options.layers)
        if options.weights is None:
            source = context.directory / "before.safetensors"
            self.save(model, source)
        else:
            source = Path(factory.make(options.weights, context.folder, f"{context.key}.weights"))
        report = self.slim.prune_model_weight(small, config, str(source))
        for leftover in context.directory.glob("before.safetensors*"):
            leftover.unlink()
        facts = {
            "headline": f"{show(self._count(model), 'count')} to {show(self._count(small), 'count')} parameters",
            "report": _plain(report),
        }
        return StageResult(small, edit={"cut": arguments}, facts=facts)

    def _distill(self, options: recipe.DistillOptions, model: Any, context: StageContext) -> StageResult:
        config = KnowledgeDistillConfig()
        for term in options.hidden:
            places = {"t_module": term.teacher, "s_module": term.student}
            config.add_inter_soft_label(
                {**places, "t_output_idx": 0, "s_output_idx": 0, "loss_func": [_loss_func(term)]}
            )
        for term in options.outputs:
            outputs = {"t_output_idx": term.teacher, "s_output_idx": term.student}
            config.add_output_soft_label({**outputs, "loss_func": [_loss_func(term)]})
        dual = self.slim.get_distill_model(context.dense(), model, config, inputs=context.data["example"])
        hard = self._loss(options, context) if options.hard_weight else None

        def compute_loss(_: Any, batch: Any) -> Any:
            if hard is None:
                return self.soft_loss(dual, batch)
            return self.soft_loss(dual, batch[0]) + options.hard_weight * hard(model, batch)

        curves = self._fit(dual, options, context, compute_loss)
        loss = curves["loss"]
        said = f"{_epochs(options)} against the dense model, mean loss {loss[0]:.4g} to {loss[-1]:.4g}"
        return StageResult(dual.get_student_model(), facts={"headline": said}, curves=curves)

    def _sparsify(self, options: recipe.SparsifyOptions, model: Any, context: StageContext) -> StageResult:
        chosen = {k: v for k in ("targets", "ignore") if (v := getattr(options, k)) is not None}
        config = SparseConfig(
            method=options.method,
            sparse_ratio=options.sparse_ratio,
            progressive=options.progressive,
            uniform=options.uniform,
            residual=options.residual,
            pattern=options.pattern,
            **chosen,
        )
        report = self.slim.Compressor(model, config).compress(self._calibration(context, options.calibration_batches))
        said = f"{options.sparse_ratio:.0%} of the weights set to zero by {options.method}"
        return StageResult(model, facts={"headline": said, "report": _plain(report)})

    def _adapt(self, options: recipe.AdaptOptions, model: Any, context: StageContext) -> StageResult:
        put_back = self.snapshot(model)
        placed: dict[str, Any] = {
            "kind": options.kind,
            "targets": options.targets,
            "rank": options.rank,
            "alpha": options.alpha,
        }
        if options.dropout:
            placed["dropout"] = options.dropout
        self.slim.apply_delta(model, **placed)
        self.slim.freeze_delta(model, options.kind)
        with self.statistics_held(model):
            curves = self._fit(model, options, context, self._loss(options, context))
        self.slim.save_delta(model, context.directory / "delta")
        fresh = self.build(context.recipe, context.folder, context.edits, context.data["example"])
        put_back(fresh)
        self.slim.load_delta(fresh, context.directory / "delta")
        gap = largest_gap(*(self.outputs(m, context.data["example"]) for m in (model, fresh)))
        if not gap <= _RELOAD_TOLERANCE:
            raise ConfigError(f"{context.key}: the reloaded delta answers differently, by {gap:.3g}")
        size = sum(f.stat().st_size for f in (context.directory / "delta").rglob("*") if f.is_file())
        trained = sum(size for size, trains in self.sizes(model) if trains)
        facts = {
            "headline": f"{trained / self._count(model):.2%} of the parameters trained; delta of "
            f"{show(size, 'bytes')}, reloaded on a fresh model with a largest difference of {gap:.2g}",
            "delta_bytes": size,
            "trained_parameters": trained,
            "reload_difference": gap,
        }
        return StageResult(model, edit={"adapt": placed}, facts=facts, curves=curves)

    def _export(self, options: recipe.ExportOptions, model: Any, context: StageContext) -> StageResult:
        wanted = options.formats or self.formats
        facts: dict[str, Any] = {}
        said: list[str] = []
        for form in wanted:
            found, words = getattr(self, f"_export_{form}")(options, model, context)
            facts.update(found)
            said.append(words)
        return StageResult(model, facts={"headline": "; ".join(said), **facts})

    def _export_mindir(
        self, options: recipe.ExportOptions, model: Any, context: StageContext
    ) -> tuple[dict[str, Any], str]:
        if not hasattr(self.slim, "export_mindir"):
            raise ConfigError(f"{context.key}.formats: mindir is MindSpore's; this recipe runs in torch")
        written = self.slim.export_mindir(
            model, context.data["example"], context.directory / "model.mindir", tolerance=options.tolerance
        )
        facts = {"mindir": {**written.to_dict(), "path": "model.mindir"}}
        return facts, f"MINDIR within {written.max_difference:.1e} of the model"

    def _export_onnx(
        self, options: recipe.ExportOptions, model: Any, context: StageContext
    ) -> tuple[dict[str, Any], str]:
        example = context.data["example"]

        def write(which: Any, name: str) -> OnnxReport:
            report: OnnxReport = self.slim.export_onnx(
                which,
                example,
                context.directory / name,
                opset=options.opset,
                dynamic_batch=options.dynamic_batch,
                tolerance=options.tolerance,
            )
            return report

        written = write(model, "model.onnx")
        facts: dict[str, Any] = {"onnx": {**written.to_dict(), "path": "model.onnx"}}
        said = f"opset {written.opset}, within {written.max_difference:.1e} of the model"
        if options.compare_dense:
            write(context.dense(), "dense.onnx")
            files = {"dense": context.directory / "dense.onnx", "final": context.directory / "model.onnx"}
            times = onnx_latency(files, dict(zip(written.inputs, self.arrays(example))))
            facts["latency_ms"] = times
            facts["latency_ratio"] = times["dense"] / times["final"]
            said += (
                f"; {times['dense']:.3f} ms dense, {times['final']:.3f} ms now in onnxruntime on one thread: "
                f"{facts['latency_ratio']:.2f} times as fast"
            )
        return facts, said


def largest_gap(first: Sequence[Array], second: Sequence[Array]) -> float:
    """Largest absolute difference between two models' outputs on one input.

    Example:
        >>> largest_gap([np.array([1.0, 2.0])], [np.array([1.0, 2.5])])
        0.5
    """
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in zip(first, second))


def _plain(report: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = report if isinstance(report, dict) else report.to_dict()
    return plain


def _epochs(options: recipe.Training) -> str:
    return "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"


def _loss_func(term: recipe.DistillTerm) -> dict[str, Any]:
    return {"func_name": term.loss, "func_weight": term.weight, "temperature": term.temperature}
