"""What each stage of a recipe does to a torch model, through the public rooms."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge, checkpoint, delta, distill, export, freeze, prune, sparse, train, weights
from slimkit.core import check
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError
from slimkit.core.onnxfile import OnnxReport, onnx_latency
from slimkit.core.run import factory, recipe
from slimkit.core.run.measurement import Measurement, show
from slimkit.core.run.pipeline import StageContext, StageResult, digest_mapping
from slimkit.core.run.recipe import Recipe
from slimkit.core.sparse import SparseConfig
from slimkit.core.weights.blocks import PruneConfig
from slimkit.measurement import measure_model

import torch
from torch import nn

# A reloaded delta must answer like the trained one; float32 sums in the same order leave no more than this.
_RELOAD_TOLERANCE = 1e-5

ComputeLoss = Callable[[nn.Module, Any], torch.Tensor]


class TorchWing:
    """PyTorch's answers to the runner of recipes (`slimkit.core.run.pipeline.Wing`)."""

    def seed(self, seed: int) -> None:
        """Seed Python, NumPy and torch."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def versions(self) -> dict[str, str]:
        """The versions that a result may depend on."""
        from slimkit import __version__

        return {"slimkit": __version__, "torch": torch.__version__, "numpy": np.__version__}

    def build(self, made: Recipe, folder: Path, edits: list[dict[str, Any]], example: Any) -> nn.Module:
        """A fresh model with the structural edits of earlier stages replayed on it, weights not yet loaded."""
        cuts = [i for i, edit in enumerate(edits) if "cut" in edit]
        arguments = edits[cuts[-1]]["cut"] if cuts else {}
        model = bridge.check_model(factory.make(made.model, folder, "model", **arguments), "model")
        for edit in edits[cuts[-1] + 1 :] if cuts else edits:
            if "prune" in edit:
                prune.Pruner(model, example).prune_by_desc(edit["prune"])
            else:
                delta.apply_delta(model, **edit["adapt"])
        return model

    def run(self, kind: str, options: Any, model: nn.Module, context: StageContext) -> StageResult:
        """Run one stage on the model."""
        return getattr(self, f"_{kind}")(options, model, context)

    def measure(self, model: nn.Module, example: Any) -> Measurement:
        """Parameters, zeros, MACs and latency."""
        return measure_model(model, example)

    def save(self, model: nn.Module, file: Path) -> None:
        """All parameters and buffers as safetensors."""
        checkpoint.save_checkpoint(model, file)

    def load(self, model: nn.Module, file: Path) -> None:
        """Take back what `save` wrote, strictly, in place."""
        checkpoint.load_checkpoint(file, model, strict_load=True)

    def digest(self, model: nn.Module) -> str:
        """SHA-256 over all parameters and buffers."""
        from slimkit.core.files import digest_array

        def raw(tensor: torch.Tensor) -> np.ndarray:
            return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

        return digest_mapping(
            {n: f"{t.dtype}{tuple(t.shape)}{digest_array(raw(t))}" for n, t in model.state_dict().items()}
        )

    def _fit(
        self, model: nn.Module, options: recipe.Training, context: StageContext, compute_loss: ComputeLoss
    ) -> dict[str, list[float]]:
        """Train the parameters that want a gradient; returns the loss of each epoch."""
        wanted = [p for p in model.parameters() if p.requires_grad]
        if not wanted:
            raise ConfigError(f"{context.key}: no parameter of the model is trainable")
        rate, decay = options.learning_rate, options.weight_decay
        if options.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(wanted, lr=rate, momentum=0.9, weight_decay=decay)
        else:
            optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=decay)
        trainer = train.Trainer(model, optimizer=optimizer, compute_loss=compute_loss)
        history = trainer.train(
            context.data["train"],
            num_epochs=options.epochs,
            per_device_batch_size=options.batch_size,
            gradient_clip_value=options.gradient_clip,
            create_scheduler_fn=_schedule(options.schedule),
        )
        return {
            "loss": [float(v) for v in history.get_metric_values("train_loss_epoch")],
            "loss_by_step": [float(v) for v in history.get_metric_values("train_loss_step")],
        }

    def _loss(self, options: recipe.Training, context: StageContext) -> ComputeLoss:
        """The task's loss as f(model, batch)."""
        reference = options.loss or context.recipe.loss
        named = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}
        if isinstance(reference, str) and reference in named:
            return lambda model, batch: named[reference](bridge.run(model, batch[0]), batch[1])
        function = factory.resolve(reference, context.folder, "loss")
        arguments = reference.arguments if isinstance(reference, factory.Factory) else {}
        return lambda model, batch: function(model, batch, **arguments)

    def _train(self, options: recipe.TrainOptions, model: nn.Module, context: StageContext) -> StageResult:
        keeper: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if options.keep_zeros:
            keeper = sparse.freeze_zeros(model)
        with keeper:
            curves = self._fit(model, options, context, self._loss(options, context))
        loss = curves["loss"]
        said = f"{options.epochs} epochs, loss {loss[0]:.4g} to {loss[-1]:.4g}" if loss else f"{options.epochs} epochs"
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

    def _prune(self, options: recipe.PruneOptions, model: nn.Module, context: StageContext) -> StageResult:
        before = sum(p.numel() for p in model.parameters())
        measured = self._calibration(context, options.calibration_batches) if options.calibration_batches else None
        pruner = (
            prune.Pruner(model, context.data["example"])
            .set_importance_evaluation_function(options.importance, calibration=measured)
            .set_node_reserved_ratio(options.node_reserved_ratio)
            .set_alignment(options.alignment)
            .set_budget(options.budget)
        )
        if options.compensation_batches:
            pruner.set_compensation(self._calibration(context, options.compensation_batches))
        desc = pruner.prune(options.reserved_ratio, un_prune_list=options.un_prune_list)
        after = sum(p.numel() for p in model.parameters())
        facts = {
            "headline": f"{show(before, 'count')} to {show(after, 'count')} parameters: {after / before:.3f} kept, "
            f"{options.reserved_ratio} asked for",
            "report": pruner.report(),
        }
        return StageResult(model, edit={"prune": desc}, facts=facts)

    def _cut(self, options: recipe.CutOptions, model: nn.Module, context: StageContext) -> StageResult:
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
        report = weights.prune_model_weight(small, config, str(source))
        (context.directory / "before.safetensors").unlink(missing_ok=True)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
        facts = {
            "headline": f"{show(before, 'count')} to {show(after, 'count')} parameters",
            "report": report if isinstance(report, dict) else report.to_dict(),
        }
        return StageResult(small, edit={"cut": arguments}, facts=facts)

    def _distill(self, options: recipe.DistillOptions, model: nn.Module, context: StageContext) -> StageResult:
        config = KnowledgeDistillConfig()
        for term in options.hidden:
            places = {"t_module": term.teacher, "s_module": term.student}
            config.add_inter_soft_label(
                {**places, "t_output_idx": 0, "s_output_idx": 0, "loss_func": [_loss_func(term)]}
            )
        for term in options.outputs:
            places = {"t_output_idx": term.teacher, "s_output_idx": term.student}
            config.add_output_soft_label({**places, "loss_func": [_loss_func(term)]})
        dual = distill.get_distill_model(context.dense(), model, config, inputs=context.data["example"])
        hard = self._loss(options, context) if options.hard_weight else None

        def compute_loss(_: nn.Module, batch: Any) -> torch.Tensor:
            soft = bridge.run(dual, batch[0] if hard else batch)[0]
            return soft + options.hard_weight * hard(model, batch) if hard else soft

        curves = self._fit(dual, options, context, compute_loss)
        loss = curves["loss"]
        said = f"{_epochs(options)} against the dense model, mean loss {loss[0]:.4g} to {loss[-1]:.4g}"
        return StageResult(dual.get_student_model(), facts={"headline": said}, curves=curves)

    def _sparsify(self, options: recipe.SparsifyOptions, model: nn.Module, context: StageContext) -> StageResult:
        chosen = {k: v for k in ("targets", "ignore") if (v := getattr(options, k)) is not None}
        config = SparseConfig(
            method=options.method,
            sparse_ratio=options.sparse_ratio,
            progressive=options.progressive,
            uniform=options.uniform,
            pattern=options.pattern,
            **chosen,
        )
        report = sparse.Compressor(model, config).compress(self._calibration(context, options.calibration_batches))
        plain = report if isinstance(report, dict) else report.to_dict()
        said = f"{options.sparse_ratio:.0%} of the weights set to zero by {options.method}"
        return StageResult(model, facts={"headline": said, "report": plain})

    def _adapt(self, options: recipe.AdaptOptions, model: nn.Module, context: StageContext) -> StageResult:
        base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        placed: dict[str, Any] = {
            "kind": options.kind,
            "targets": options.targets,
            "rank": options.rank,
            "alpha": options.alpha,
        }
        if options.dropout:
            placed["dropout"] = options.dropout
        delta.apply_delta(model, **placed)
        freeze.freeze_delta(model, options.kind)
        curves = self._fit(model, options, context, self._loss(options, context))
        delta.save_delta(model, context.directory / "delta")
        fresh = self.build(context.recipe, context.folder, context.edits, context.data["example"])
        fresh.load_state_dict(base)
        delta.load_delta(fresh, context.directory / "delta")
        gap = _largest_gap(model, fresh, context.data["example"])
        if not gap <= _RELOAD_TOLERANCE:
            raise ConfigError(f"{context.key}: the reloaded delta answers differently, by {gap:.3g}")
        size = sum(f.stat().st_size for f in (context.directory / "delta").rglob("*") if f.is_file())
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {
            "headline": f"{trained / total:.2%} of the parameters trained; delta of {show(size, 'bytes')}, "
            f"reloaded on a fresh model with a largest difference of {gap:.2g}",
            "delta_bytes": size,
            "trained_parameters": trained,
            "reload_difference": gap,
        }
        return StageResult(model, edit={"adapt": placed}, facts=facts, curves=curves)

    def _export(self, options: recipe.ExportOptions, model: nn.Module, context: StageContext) -> StageResult:
        example = context.data["example"]

        def write(which: nn.Module, name: str) -> OnnxReport:
            return export.export_onnx(
                which,
                example,
                context.directory / name,
                opset=options.opset,
                dynamic_batch=options.dynamic_batch,
                tolerance=options.tolerance,
            )

        written = write(model, "model.onnx")
        facts: dict[str, Any] = {"onnx": {**written.to_dict(), "path": "model.onnx"}}
        said = f"opset {written.opset}, within {written.max_difference:.1e} of the model"
        if options.compare_dense:
            write(context.dense(), "dense.onnx")
            files = {"dense": context.directory / "dense.onnx", "final": context.directory / "model.onnx"}
            times = onnx_latency(files, export.example_arrays(example))
            facts["latency_ms"] = times
            facts["latency_ratio"] = times["dense"] / times["final"]
            said += (
                f"; {times['dense']:.3f} ms dense, {times['final']:.3f} ms now in onnxruntime on one thread: "
                f"{facts['latency_ratio']:.2f} times as fast"
            )
        return StageResult(model, facts={"headline": said, **facts})


def _epochs(options: recipe.Training) -> str:
    return "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"


def _loss_func(term: recipe.DistillTerm) -> dict[str, Any]:
    return {"func_name": term.loss, "func_weight": term.weight, "temperature": term.temperature}


def _schedule(name: str) -> Callable[..., Any] | None:
    """A scheduler factory: optimizer and number of updates in, scheduler out."""
    from torch.optim import lr_scheduler

    makers: dict[str, Callable[..., Any] | None] = {
        "constant": None,
        "cosine": lr_scheduler.CosineAnnealingLR,
        "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
    }
    return makers[check.choice(name, makers, "schedule")]


def _largest_gap(first: nn.Module, second: nn.Module, example: Any) -> float:
    """Largest absolute difference between two models' outputs on one input."""
    outputs = []
    for model in (first, second):
        with bridge.evaluating(model):
            outputs.append([t for _, t in export.named_tensors(bridge.run(model, example))])
    return max(float((a - b).abs().max()) for a, b in zip(*outputs))
