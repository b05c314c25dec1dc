"""Distillation and adaptation of networks that a function makes, alike in both frameworks: arrays or batches in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.core import check, files
from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig
from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs import data as sources
from slimkit.core.jobs import fitting, folders
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.jobs.supervised import Supervised, supervised
from slimkit.core.jobs.training import AdaptAims, DistillAims, TrainingPlan

if TYPE_CHECKING:
    from slimkit.core.jobs.wing import Jobs, Opened

_NAMED = ("auto", "cross_entropy", "mse")

ComputeLoss = Callable[[Any, Any], Any]


def adapt(
    jobs: Jobs, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: AdaptAims
) -> dict[str, Any]:
    """Train a delta on a network with labelled arrays, and save it as a bundle.

    Args:
        jobs: the framework's side of the commands.
        place: the network.
        data: labelled arrays, or a function that returns batches of (inputs, labels).
        out: the bundle's folder; None only says what would be done.
        plan: how to train.
        aims: what to train.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigError: the network cannot be called with the data, or data and loss do not fit.
    """
    read = supervised(data, aims.label_key, jobs, labels=True)
    held = None
    if aims.evaluation is not None:
        held = supervised(aims.evaluation, aims.label_key, jobs, labels=True, option="--eval")
    opened = jobs.open(place)
    name, loss = _loss(jobs, aims.loss, read, opened)
    _prove(jobs, opened, name, loss, read.first(plan.batch_size))
    base = jobs.stages.digest(opened.model)
    settings = dict(aims.settings)
    if aims.kind == "prefix" and not {"inputs", "sizes"} & set(settings):
        settings["inputs"] = read.first(plan.batch_size)[0]
    with jobs.seeded(plan.seed):
        told = jobs.slim.apply_delta(
            opened.model, aims.kind, aims.targets, also_train=aims.also_train, **settings
        )  # fmt: skip
    facts: dict[str, Any] = {
        "task": name,
        "labels": {},
        "fresh": [],
        "kind": aims.kind,
        "layers": sorted(told.layers),
        **fitting.share(jobs.stages.sizes(opened.model)),
        "samples": read.count,
    }
    if out is None:
        return facts
    job = {"command": "adapt", **aims.identity(), "label_key": aims.label_key, "base": base, "data": read.identity}
    with jobs.stages.statistics_held(opened.model):
        facts |= fitting.fit(jobs, opened.model, read.samples, plan, out, job, loss, read.collate)
    if held is not None:
        facts["evaluation"] = _evaluate(jobs, opened.model, held, name, loss, plan.batch_size)
    return write_adapted(jobs, opened, out, aims, facts)


def write_adapted(jobs: Jobs, opened: Opened, out: Path, aims: AdaptAims, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the trained delta of a model, with its report and, where asked for, the merged model; returns the facts."""
    with files.atomic_directory(out) as folder:
        jobs.slim.save_delta(opened.model, folder, format=aims.format)
        facts = {**facts, "delta_bytes": sum(f.stat().st_size for f in folder.iterdir())}
        if aims.merge:
            jobs.slim.merge_delta(opened.model, unload=True)
            (folder / "merged").mkdir()
            facts["written"] = jobs.write_model(opened, folder / "merged")
        folders.write_report(folder, "adapt", facts)
    return facts


def distill(
    jobs: Jobs, place: ModelPlace, data: DataPlace, out: Path | None, plan: TrainingPlan, aims: DistillAims
) -> dict[str, Any]:
    """Train a network to answer like another one.

    Args:
        jobs: the framework's side of the commands.
        place: the teacher.
        data: arrays or a function that returns batches; with labels where `aims` has a hard weight.
        out: the student's folder; None only says what would be done.
        plan: how to train.
        aims: the student, and what it learns.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigError: no student, a network that cannot be called with the data, tensors that cannot be compared.
    """
    if aims.sizes or aims.student is None:
        raise ConfigError(
            "a factory's teacher needs a student: --student-factory MODULE:FUNCTION, or --student-arg KEY=VALUE for "
            "the teacher's own factory; --layers, --ffn, --heads and --hidden are for Hugging Face directories"
        )
    hard_weight = aims.hard_weight
    read = supervised(data, aims.label_key, jobs, labels=bool(hard_weight))
    teacher = jobs.open(place)
    with jobs.seeded(plan.seed):
        student = jobs.open(aims.student)
    batch = read.first(plan.batch_size)
    inputs = batch[0] if hard_weight else batch
    answers = [_called(jobs, which, inputs) for which in (teacher, student)]
    hard: ComputeLoss | None = None
    if hard_weight:
        name, hard = _loss(jobs, aims.loss, read, student)
        _prove(jobs, student, name, hard, batch)
    config = _comparison(aims, answers[0][0].shape)
    facts: dict[str, Any] = {
        "teacher_parameters": jobs.parameters(teacher.model),
        "parameters": jobs.parameters(student.model),
        "layers": {mine: theirs for theirs, mine in aims.matches},
        "samples": read.count,
        "terms": [f"{at.label}: {term.func_name}" for at in config.spec().soft_labels for term in at.losses],
    }
    job = {"command": "distill", **aims.identity(), "data": read.identity}
    job |= {"teacher": jobs.stages.digest(teacher.model), "start": jobs.stages.digest(student.model)}
    with jobs.seeded(plan.seed):
        dual = jobs.slim.get_distill_model(teacher.model, student.model, config, inputs=inputs)
    if out is None:
        return facts

    def loss(_: Any, batch: Any) -> Any:
        if hard is None:
            return jobs.stages.soft_loss(dual, batch)
        return jobs.stages.soft_loss(dual, batch[0]) + hard_weight * hard(student.model, batch)

    facts |= fitting.fit(jobs, dual, read.samples, plan, out, job, loss, read.collate)
    student.model = dual.get_student_model()
    with files.atomic_directory(out) as folder:
        facts["written"] = jobs.write_model(student, folder)
        folders.write_report(folder, "distill", facts)
    return facts


def _comparison(aims: DistillAims, shape: tuple[int, ...]) -> KnowledgeDistillConfig:
    """Outputs against outputs, and each pair of layers that was named."""
    config = KnowledgeDistillConfig()
    if aims.output_weight:
        classes = len(shape) == 2 and shape[1] > 1
        name = aims.output_loss if aims.output_loss != "auto" else "KDKLDiv" if classes else "HiddenMse"
        softened = check.choice(name, LOSSES, "--output-loss") and LOSSES[name][1]
        term: dict[str, Any] = {"func_name": name, "func_weight": aims.output_weight}
        if softened:
            term |= {"temperature": aims.temperature, "t_squared": True}
        config.add_output_soft_label({"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]})
    for theirs, mine in aims.matches if aims.hidden_weight else ():
        term = {"func_name": "HiddenMse", "func_weight": aims.hidden_weight}
        places = {"t_module": theirs, "s_module": mine, "t_output_idx": 0, "s_output_idx": 0}
        config.add_inter_soft_label({**places, "loss_func": [term]})
    if not aims.output_weight and not (aims.matches and aims.hidden_weight):
        raise ConfigError("--output-weight is 0 and no --match is weighed: there is nothing to learn from")
    return config


def _loss(jobs: Jobs, asked: str, read: Supervised, opened: Opened) -> tuple[str, ComputeLoss]:
    """The loss that was asked for, by name or as a function f(model, batch)."""
    if asked not in _NAMED:
        if ":" not in asked:
            check.choice(asked, (*_NAMED, "MODULE:FUNCTION"), "--loss")
        return asked, sources.found(asked, "--loss")
    if opened.is_hf:
        raise ConfigError("--loss: arrays on a Hugging Face directory need --loss MODULE:FUNCTION, f(model, batch)")
    name = asked if asked != "auto" else "cross_entropy" if read.integers else "mse"
    loss = jobs.stages.named_loss(name)
    assert loss is not None
    return name, loss


def _called(jobs: Jobs, opened: Opened, inputs: Any) -> list[Any]:
    """The arrays that a network answers with; whatever it raises is told with the network's name."""
    where = opened.place.factory or opened.place.model
    try:
        found: list[Any] = jobs.stages.outputs(opened.model, inputs)
    except SlimkitError:
        raise
    except Exception as error:  # the user's network raises what it likes
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where} cannot be called with the data: {type(error).__name__}: {reason}") from error
    if not found:
        raise ConfigError(f"{where} answers with no tensor")
    return found


def _prove(jobs: Jobs, opened: Opened, name: str, loss: ComputeLoss, batch: Any) -> None:
    """Refuse data and a loss that do not fit, on the first batch and before anything changes."""
    answer = _called(jobs, opened, batch[0])[0]
    if name == "mse":
        wanted = jobs.stages.arrays(batch[1])[0].shape
        if answer.shape != wanted:  # frameworks would repeat the smaller one in silence
            raise ConfigError(f"--loss mse: the network answers with {answer.shape} where the labels are {wanted}")
    try:
        with jobs.evaluating(opened.model):
            float(loss(opened.model, batch))
    except SlimkitError:
        raise
    except Exception as error:  # the user's loss and labels
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--loss {name} does not fit the data: {type(error).__name__}: {reason}") from error


def _evaluate(
    jobs: Jobs, model: Any, held: Supervised, name: str, loss: ComputeLoss, batch_size: int
) -> dict[str, float]:
    """Mean loss over samples, with the accuracy of a classifier."""
    total = right = 0.0
    seen = counted = 0
    with jobs.evaluating(model):
        for batch in held.batches(batch_size):
            labels = jobs.stages.arrays(batch[1])[0]
            total, seen = total + float(loss(model, batch)) * len(labels), seen + len(labels)
            if name == "cross_entropy":
                right += float((jobs.stages.outputs(model, batch[0])[0].argmax(1) == labels).sum())
                counted += labels.size
    return {"loss": total / seen, **({"accuracy": right / counted} if counted else {})}
