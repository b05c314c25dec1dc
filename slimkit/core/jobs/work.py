"""What each job does to a model of either framework: model and options in, model and facts out."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.delta import opening
from slimkit.core.delta.starts import FROM_DATA
from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig
from slimkit.core.distill.shapes import pick
from slimkit.core.distill.students import warn_unmeasured
from slimkit.core.errors import ConfigError
from slimkit.core.files import digest_array
from slimkit.core.jobs import fitting, rdrop
from slimkit.core.jobs.framework import Array, ComputeLoss, JobFramework, JobResult
from slimkit.core.jobs.measurement import goal, show
from slimkit.core.jobs.options import (
    AdaptOptions,
    CutOptions,
    DistillOptions,
    FitOptions,
    SparsifyOptions,
    TrainOptions,
)
from slimkit.core.log import logger

_START_BATCHES = 8  # of the training data, for a start that is read from data


class JobContext(ABC):
    """What a job is given beside its model and its options, by a recipe or by a command.

    Args:
        face: the framework.
        seed: of everything the job draws.
        example: one batch of inputs.
    """

    def __init__(self, face: JobFramework, seed: int, example: Any) -> None:
        self.face, self.seed, self.example = face, seed, example

    @abstractmethod
    def spell(self, key: str) -> str:
        """How the user writes an option of this job."""

    @abstractmethod
    def function(self, reference: str, key: str) -> Callable[..., Any]:
        """The user's function that an option names."""

    @abstractmethod
    def file(self, name: str) -> Path:
        """The file that an option names."""

    @abstractmethod
    def calibration(self, count: int | None = None) -> Sequence[Any]:
        """Calibration batches, at most so many; ConfigError where there are none."""

    @property
    def has_data(self) -> bool:
        """Whether there are calibration batches."""
        return False

    def tokenizer(self, folder: str | None) -> Any:
        """The tokenizer in a folder, or (None) the one that came with the model; ConfigError where it has none."""
        raise ConfigError(f"{self.spell('settings')}: a text needs a tokenizer, which this job has none of")

    @abstractmethod
    def lessons(self, count: int, size: int) -> list[Any]:
        """At most so many batches (inputs, labels) of the training data; `size` is that of those not ready made."""

    @abstractmethod
    def loss(self, asked: Any) -> tuple[str, ComputeLoss]:
        """The task's loss and its name, by the job's option `loss`."""

    @abstractmethod
    def fit(self, model: Any, options: FitOptions, loss: ComputeLoss) -> dict[str, Any]:
        """Train what wants a gradient on the training data; returns what `fitting.fit` does."""


def count(face: JobFramework, model: Any) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(size for size, _ in face.sizes(model))


def digest(face: JobFramework, model: Any) -> str:
    """SHA-256 over all parameters and buffers, whatever their order."""
    parts = {name: f"{kind}{digest_array(raw)}" for name, kind, raw in face.states(model)}
    return sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def named_loss(face: JobFramework, name: str, spell: Callable[[str], str]) -> ComputeLoss:
    """f(model, (inputs, targets)) for a loss that the framework has by name."""
    function = face.losses[name]

    def loss(model: Any, batch: Any) -> Any:
        answer, target = face.call(model, batch[0]), batch[1]
        if name == "mse" and tuple(answer.shape) != tuple(target.shape):
            # Frameworks would repeat the smaller one in silence.
            raise ConfigError(
                f"{spell('loss')} mse: the network answers with {tuple(answer.shape)} where the labels are "
                f"{tuple(target.shape)}"
            )
        return function(answer, target)

    return loss


# train --------------------------------------------------------------------------------------------------------------


def train(model: Any, options: TrainOptions, context: JobContext) -> JobResult:
    """Train all parameters, in place; zeros stay zero where that was asked for."""
    face = context.face
    if not options.keep_zeros and face.made_zeros(model):
        logger.warning("training fills the zeros that were made in this model; keep_zeros keeps them")
    with _zeros_kept(face, model, options.keep_zeros):
        fitted = context.fit(model, options, context.loss(options.loss)[1])
    said = _trained(fitted) + (", zeros kept" if options.keep_zeros else "")
    return JobResult(model, facts={"headline": said, "steps": fitted["steps"]}, curves=curves(fitted))


def _zeros_kept(face: JobFramework, model: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which the zeros of a model stay, where that is wanted."""
    if not wanted:
        return contextlib.nullcontext()
    held: contextlib.AbstractContextManager[Any] = face.slim.freeze_zeros(model)
    return held


def curves(fitted: Mapping[str, Any]) -> dict[str, list[float]]:
    """The curves of a training run, for plots."""
    return {"loss": fitted["loss_by_epoch"], "loss_by_step": fitted["loss_by_step"]}


def _trained(fitted: Mapping[str, Any]) -> str:
    losses, steps = fitted["loss_by_epoch"], fitted["steps"]
    took = f"{len(losses)} epoch{'s' if len(losses) != 1 else ''} of {steps} updates in all"
    if not losses:
        return f"{steps} updates"
    return f"{took}, loss {losses[0]:.4g}" + (f" to {losses[-1]:.4g}" if len(losses) > 1 else " on average")


# cut, sparsify -----------------------------------------------------------------------------------------------------


def cut(small: Any, weights: Path, options: CutOptions, context: JobContext, large: Any) -> JobResult:
    """Cut the weights of a smaller instance of a model out of a file, in place; `large` is what may be measured."""
    face = context.face
    config, kept = options.build(), options.layers
    measures = options.selection == "importance" and "prune_bert_intra_block" in options.steps and context.has_data
    if options.keep_blocks is not None or measures:
        batches = context.calibration(options.calibration_batches)
        pattern = options.pattern
        if options.keep_blocks is not None:
            found = face.slim.suggest_layer_map(large, batches, options.keep_blocks)
            pattern, kept = pattern or found.pattern, found.layer_id_map
        config = options.chosen(pattern, kept, face.slim.measure_activations(large, batches) if measures else None)
    warn_unmeasured({"hidden": 1} if "prune_bert_intra_block" in options.steps else {}, options.selection, measures)
    report = face.slim.prune_model_weight(small, config, str(weights))
    said = f"{show(count(face, large), 'count')} to {show(count(face, small), 'count')} parameters"
    blocks = {} if kept is None else {"layers": {str(new): old for new, old in kept.items()}}
    return JobResult(small, facts={"headline": said, "report": _plain(report), **blocks})


def sparsify(model: Any, options: SparsifyOptions, context: JobContext) -> JobResult:
    """Set weights to zero, in place."""
    config = options.build()
    batches = context.calibration(options.calibration_batches) if config.needs_data else None
    report = _plain(context.face.slim.Compressor(model, config).compress(batches))
    facts = {"headline": sparse_headline(report), "goal": sparse_goal(report), "report": report}
    return JobResult(model, edit={"sparse": list(report["layers"])}, facts=facts)


def _plain(report: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = report if isinstance(report, dict) else report.to_dict()
    return plain


def sparse_goal(report: Mapping[str, Any]) -> dict[str, Any]:
    """The share of zeros that a report of sparsity was asked for, and what it reached."""
    asked, reached = report["config"]["sparse_ratio"], report["zeros"] / report["weights"] if report["weights"] else 0.0
    short = report["zeros"] < asked * report["weights"] - len(report["layers"])  # a layer's share is rounded
    return goal("weights set to zero", asked, reached, short)


def sparse_headline(report: Mapping[str, Any]) -> str:
    """What a report of sparsity says in one sentence, all of it counted in the weights.

    Example:
        >>> sparse_headline({"zeros": 3, "weights": 4, "layers": {"a": {"method": "wanda"}}})
        '3 of 4 weights of 1 layers are zero: 0.750, by wanda'
    """
    methods = [row["method"] for row in report["layers"].values()]
    named = [f"{m} ({methods.count(m)} layers)" if len(set(methods)) > 1 else m for m in dict.fromkeys(methods)]
    share = report["zeros"] / report["weights"] if report["weights"] else 0.0
    return f"{report['zeros']:,} of {report['weights']:,} weights of {len(methods)} layers are zero: {share:.3f}" + (
        f", by {' and '.join(named)}" if named else ""
    )


# distill ------------------------------------------------------------------------------------------------------------


def distill(
    teacher: Any,
    student: Any,
    options: DistillOptions,
    context: JobContext,
    config: KnowledgeDistillConfig | None = None,
) -> JobResult:
    """Train a student to answer as its teacher does, in place; `config` says what is compared, or the options do.

    Zeros that were made in it stay.
    """
    face = context.face
    if config is None:
        config = compared(face, teacher, options, context.example)
    hard = context.loss(options.loss)[1] if options.hard_weight else None
    with face.seeded(context.seed):
        dual = face.slim.get_distill_model(teacher, student, config, inputs=context.example)

    def loss(_: Any, batch: Any) -> Any:
        if hard is None:
            return face.soft_loss(dual, batch)
        return face.soft_loss(dual, batch[0]) + options.hard_weight * hard(student, batch)

    sparse = face.made_zeros(student)
    with _zeros_kept(face, student, sparse):
        fitted = context.fit(dual, options, loss)
    said = f"against the dense model {_trained(fitted)}" + (", zeros kept" if sparse else "")
    facts = {"headline": said, "terms": terms(config), **fitted}
    facts.pop("loss_by_step")
    return JobResult(dual.get_student_model(), facts=facts, curves=curves(fitted))


def compared(face: JobFramework, teacher: Any, options: DistillOptions, example: Any) -> KnowledgeDistillConfig:
    """What the options compare; where the batch has an attention_mask, padding counts in no term that it fits."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    paths = [term.teacher for term in options.hidden if isinstance(term.teacher, str)] or [
        t for t, _ in options.pairs()
    ]
    known = {} if mask is None else face.inside(teacher, example, list(dict.fromkeys(paths)))

    def mask_of(path: Any, index: Any, loss: str) -> str | None:
        if mask is None or (path or "") not in known:
            return None
        shape = tuple(pick(known[path or ""], index, path or "output").shape)
        rows = (shape[0], shape[-1]) if LOSSES[loss][0] == "attention" else shape[:-1]
        return "attention_mask" if rows == tuple(mask.shape) else None

    return options.comparison(lambda: face.outputs(teacher, example)[0].shape, mask_of)


def terms(config: KnowledgeDistillConfig) -> list[str]:
    """What a configuration compares, for people."""
    return [f"{at.label}: {term.func_name}" for at in config.spec().soft_labels for term in at.losses]


# adapt --------------------------------------------------------------------------------------------------------------


def put_on(face: JobFramework, model: Any, arguments: Mapping[str, Any], inputs: Any) -> Any:
    """Put an untrained delta on a model, in place; returns its report.

    Args:
        face: the framework.
        model: the model.
        arguments: of `apply_delta`, as `AdaptOptions.arguments` gives them.
        inputs: one batch, by which a prefix finds the attention.
    """
    seen = arguments["kind"] == "prefix" and not {"inputs", "sizes"} & set(arguments)
    return face.slim.apply_delta(model, **arguments, **({"inputs": inputs} if seen else {}))


def _start(options: AdaptOptions, context: JobContext) -> dict[str, Any]:
    """What `apply_delta` reads a LoRA's start from, where the options ask for one that is read from data."""
    init = options.of_kind().get("init")
    if options.kind != "lora" or init not in FROM_DATA:
        return {}
    batches = context.lessons(_START_BATCHES, options.batch_size)
    if init == "activations":
        return {"calibration": [inputs for inputs, _ in batches]}
    return {"calibration": batches, "loss": context.loss(options.loss)[1]}


def _again(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make the same structure again, for values that are loaded into it."""
    return {k: v for k, v in arguments.items() if k != "init" or v not in FROM_DATA}


def _arguments(options: AdaptOptions, context: JobContext) -> dict[str, Any]:
    """The arguments of `apply_delta` as plain values; a text that a delta begins as becomes its token ids."""
    arguments = options.arguments()
    if "text" not in arguments:
        return arguments
    text, tokenizer = arguments.pop("text"), context.tokenizer(arguments.pop("tokenizer", None))
    return {**arguments, "text_ids": opening.ids_of(text, tokenizer)}


def _warmth(options: AdaptOptions) -> dict[str, Any]:
    return {} if options.temperature is None else {"temperature": options.temperature}


def place_delta(model: Any, options: AdaptOptions, context: JobContext) -> dict[str, Any]:
    """Put an untrained delta on a model, in place; returns what it weighs."""
    return _placed(model, options, context, _arguments(options, context))


def _placed(model: Any, options: AdaptOptions, context: JobContext, arguments: Mapping[str, Any]) -> dict[str, Any]:
    with context.face.seeded(context.seed):
        told = put_on(context.face, model, {**arguments, **_start(options, context)}, context.example)
    return {"kind": options.kind, "layers": sorted(told.layers), **fitting.share(context.face.sizes(model))}


def adapt(model: Any, options: AdaptOptions, context: JobContext, teacher: Any = None) -> JobResult:
    """Put a delta on a model and train it, in place; `teacher` answers too where the options weigh its answers."""
    face, arguments = context.face, _arguments(options, context)
    facts = _placed(model, options, context, arguments)
    name, hard = context.loss(options.loss)
    if options.rdrop:
        hard = rdrop.loss_of(face, name, options.rdrop)
        facts["rdrop"] = options.rdrop
    learner, loss = model, hard
    if options.distill_weight:
        config = compared(
            face, teacher, DistillOptions(output_weight=options.distill_weight, **_warmth(options)), context.example
        )
        with face.seeded(context.seed):
            learner = face.slim.get_distill_model(teacher, model, config, inputs=context.example)
        facts["terms"] = terms(config)
        dual = learner

        def loss(_: Any, batch: Any) -> Any:
            return hard(model, batch) + face.soft_loss(dual, batch[0])

    with face.statistics_held(model):
        fitted = context.fit(learner, options, loss)
    facts |= {"steps": fitted["steps"], "loss_by_epoch": fitted["loss_by_epoch"]}
    return JobResult(model, edit={"adapt": _again(arguments)}, facts=facts, curves=curves(fitted))


# export -------------------------------------------------------------------------------------------------------------


def largest_gap(first: Iterable[Array], second: Iterable[Array]) -> float:
    """Largest absolute difference between two models' outputs on one input.

    Example:
        >>> largest_gap([np.array([1.0, 2.0])], [np.array([1.0, 2.5])])
        0.5
    """
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in zip(first, second))
