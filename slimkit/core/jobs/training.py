"""The commands that train, `distill` and `adapt`: on arrays of one's own, or on text where the framework reads it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.delta.peft import KINDS as PEFT_KINDS
from slimkit.core.delta.spec import MERGING
from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs import cards, crew, fed, fitting, folders, teaching, work
from slimkit.core.jobs.commands import CommandContext
from slimkit.core.jobs.framework import ComputeLoss, FitRun, JobFramework, Lesson, Opened, Task
from slimkit.core.jobs.options import AdaptOptions, DistillOptions, FitOptions, TrainOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace
from slimkit.core.jobs.supervised import supervised


def distill(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    options: DistillOptions,
    student: StudentPlace,
    run: FitRun,
    *,
    label_key: str = "labels",
) -> dict[str, Any]:
    """Train a student to answer like its teacher; with `out` None only say what would be done.

    Args:
        face: the framework.
        place: the teacher.
        data: arrays or a function that returns batches, with labels where the options have a hard weight; or text.
        out: the student's folder.
        options: of the job.
        student: which one.
        run: how the state is kept.
        label_key: the array that holds the labels.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigError: no student, a network that cannot be called with the data, tensors that cannot be compared.
    """
    if out is not None:
        face.join()
    if face.learns_text(place, data):
        given = face.lesson(place, data, options, student, run.seed)
    else:
        given = _lesson(face, place, data, options, student, run.seed, label_key)
    teacher, learner, read = given.teacher, given.student, given.read
    batch = read.first(options.batch_size)
    context = CommandContext(
        face, run.seed, batch[0] if read.labelled else batch, options, read=read, is_hf=learner.is_hf
    )
    config = given.config
    if config is None:
        _called(face, learner, context.example)
        if read.labelled:
            _prove(face, learner, *context.loss(options.loss), batch)
        config = work.compared(face, teacher.model, options, context.example)
    facts: dict[str, Any] = {
        "teacher_parameters": work.count(face, teacher.model),
        "parameters": work.count(face, learner.model),
        "layers": dict(given.layers),
        "samples": read.count,
        **read.facts,
        "terms": work.terms(config),
    }
    # What cannot be compared is refused before anything is written.
    with face.seeded(run.seed):
        face.slim.get_distill_model(teacher.model, learner.model, config, inputs=context.example).get_student_model()
    if out is None:
        return facts
    job = {"command": "distill", **_identity(options), **student.identity(), "label_key": label_key}
    job |= {"data": read.identity, "teacher": work.digest(face, teacher.model)}
    job |= {"start": work.digest(face, learner.model)}
    state = Path(face.once(lambda: str(fitting.begin(options, out, run, job))))
    context.keeps = out, replace(run, restart=False), job
    knows = teaching.taught(face, given, config, options, student.teacher, state)
    if knows is not teacher.model:
        teacher.model = None  # its answers are on disk, and its memory is the student's
    else:
        face.share(teacher)
    face.share(learner)
    facts["teacher"] = "online" if teacher.model is not None else "cached"
    done = work.distill(knows, learner.model, options, context, config)
    learner.model = done.model
    facts |= {key: done.facts[key] for key in ("steps", "loss_by_epoch")}
    face.gather(learner)
    if crew.rank() > 0:
        return facts
    with files.atomic_directory(out) as folder:
        facts["written"] = face.write_model(learner, folder)
        begun = None if student.place is None else student.place.model
        if begun is not None and begun.is_dir() and folders.made_sparse(begun):
            files.write_json(folder / folders.SPARSE_REPORT, files.read_json(begun / folders.SPARSE_REPORT))
        folders.write_report(folder, "distill", facts)
        more = cards.data_flags(data, "--data") | cards.student_flags(student) | _beside(run, label_key)
        command = cards.command_line("distill", place, options, more)
        cards.write_card(folder, "distilled", learner, command, cards.distilled_facts(facts), facts["written"])
    return facts


def adapt(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    options: AdaptOptions,
    run: FitRun,
    *,
    task: str = "auto",
    evaluation: DataPlace | None = None,
    label_key: str = "labels",
    format: str = "slimkit",
    merge: bool = False,
) -> dict[str, Any]:
    """Train a delta on a frozen model and save it as a bundle; with `out` None only say what would be done.

    Args:
        face: the framework.
        place: the model.
        data: labelled arrays, or a function that returns batches of (inputs, labels); or text.
        out: the bundle's folder.
        options: of the job.
        run: how the state is kept.
        task: of text: "auto", "classification" or "causal-lm".
        evaluation: held-out data of the same form.
        label_key: the array that holds the labels.
        format: "slimkit" or "peft".
        merge: also write the merged model into OUT/merged.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigError: the network cannot be called with the data, or data and loss do not fit; the kind cannot be merged,
            or not be written in that format.
    """
    # Refused now, and not after hours of training.
    if merge and options.kind not in MERGING:
        kinds = " and ".join(MERGING)
        raise ConfigError(f"--merge is for --kind {kinds}: nothing else merges into weights. Received: {options.kind}")
    if format == "peft" and options.kind not in (known := sorted(set(PEFT_KINDS.values()))):
        raise ConfigError(f"--format peft is for --kind {', '.join(known)}. Received: {options.kind}")
    if out is not None:
        face.join()
    given = _task(face, place, data, evaluation, task, options, run.seed, label_key)
    opened, read = given.opened, given.read
    assert isinstance(given.options, AdaptOptions)
    options = given.options
    inputs = read.first(options.batch_size)[0]
    context = CommandContext(
        face, run.seed, inputs, options, read=read, named_loss=(given.name, given.loss),
        words=lambda: face.tokenizer(opened),
    )  # fmt: skip
    facts: dict[str, Any] = {
        "task": given.name, "labels": given.labels, "fresh": list(opened.fresh), "samples": read.count, **read.facts
    }  # fmt: skip
    if out is None:
        return facts | work.place_delta(opened.model, options, context)
    job = {"command": "adapt", "task": given.name, **_identity(options), "label_key": label_key}
    context.keeps = out, run, job | {"base": work.digest(face, opened.model), "data": read.identity}
    face.share(opened)
    facts |= work.adapt(opened.model, options, context).facts
    if given.held is not None:
        facts["evaluation"] = _evaluate(face, opened.model, given, options.batch_size)
    with crew.result(out) as folder:
        face.slim.save_delta(opened.model, folder, format=format)
        if merge:
            face.slim.merge_delta(opened.model, unload=True)
            face.gather(opened)
        if crew.rank() > 0:
            return facts
        facts["delta_bytes"] = sum(f.stat().st_size for f in folder.iterdir())
        if merge:
            (folder / "merged").mkdir()
            facts["written"] = face.write_model(opened, folder / "merged")
        folders.write_report(folder, "adapt", facts)
        more = cards.data_flags(data, "--data") | _beside(run, label_key, task, evaluation)
        more["--format"] = "peft" if format == "peft" else None
        command = cards.command_line("adapt", place, options, more)
        reads = "peft" if format == "peft" else "delta"
        cards.write_card(folder, "delta", opened, command, cards.trained_facts(facts), reads)
    return facts


def train(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    options: TrainOptions,
    run: FitRun,
    *,
    task: str = "auto",
    evaluation: DataPlace | None = None,
    label_key: str = "labels",
) -> dict[str, Any]:
    """Train all parameters and write the model; with `out` None only say what would be done.

    The zeros of a model that was made sparse stay, as with `keep_zeros`.

    Args:
        face, place, data, run, task, evaluation, label_key: as for `adapt`.
        out: the model's folder, of the kind that was read.
        options: of the job.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigError: the network cannot be called with the data, or data and loss do not fit.
    """
    if out is not None:
        face.join()
    given = _task(face, place, data, evaluation, task, options, run.seed, label_key)
    opened, read = given.opened, given.read
    made = [] if place.model is None or not place.model.is_dir() else folders.made_sparse(place.model)
    if made and not options.keep_zeros:
        options = options.model_copy(update={"keep_zeros": True})
    facts: dict[str, Any] = {
        "task": given.name, "labels": given.labels, "fresh": list(opened.fresh), "samples": read.count, **read.facts,
        "parameters": work.count(face, opened.model), "zero_layers": len(made),
    }  # fmt: skip
    if out is None:
        return facts
    inputs = read.first(options.batch_size)[0]
    context = CommandContext(face, run.seed, inputs, options, read=read, named_loss=(given.name, given.loss))
    job = {"command": "train", "task": given.name, **_identity(options), "label_key": label_key}
    context.keeps = out, run, job | {"base": work.digest(face, opened.model), "data": read.identity}
    face.share(opened)
    done = work.train(opened.model, options, context)
    facts |= {"steps": done.facts["steps"], "loss_by_epoch": done.curves["loss"]}
    if given.held is not None:
        facts["evaluation"] = _evaluate(face, opened.model, given, options.batch_size)
    face.gather(opened)
    if crew.rank() > 0:
        return facts
    with files.atomic_directory(out) as folder:
        facts["written"] = face.write_model(opened, folder)
        if made and place.model is not None:  # what reads the folder knows which zeros were made
            files.write_json(folder / folders.SPARSE_REPORT, files.read_json(place.model / folders.SPARSE_REPORT))
        folders.write_report(folder, "train", facts)
        command = cards.command_line(
            "train", place, options, cards.data_flags(data, "--data") | _beside(run, label_key, task, evaluation)
        )
        cards.write_card(folder, "trained", opened, command, cards.trained_facts(facts), facts["written"])
    return facts


def _identity(options: FitOptions) -> dict[str, Any]:
    """What a resumed run must agree in, beside how it trains."""
    return options.model_dump(mode="json", exclude=set(FitOptions.model_fields))


def _beside(run: FitRun, label_key: str, task: str = "auto", evaluation: DataPlace | None = None) -> dict[str, Any]:
    """The options of a command line beside those of the job and of its data."""
    return {
        "--task": None if task == "auto" else task,
        "--label-key": None if label_key == "labels" else label_key,
        "--eval": None if evaluation is None else evaluation.reference,
        "--seed": run.seed or None,
    }


def _lesson(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    options: DistillOptions,
    student: StudentPlace,
    seed: int,
    label_key: str,
) -> Lesson:
    """A teacher and a student of one's own, and arrays."""
    if student.sizes or student.layer_map is not None or student.place is None:
        raise ConfigError(
            "a factory's teacher needs a student: --student-factory MODULE:FUNCTION, or --student-arg KEY=VALUE for "
            "the teacher's own factory; the sizes (--layers, --ffn, ...) are for Hugging Face directories"
        )
    read = supervised(data, label_key, face, labels=bool(options.hard_weight))
    teacher = face.open(place)
    read = fed.fitted_samples(face, teacher, read)
    with face.seeded(seed):
        learner = face.open(student.place)
    return Lesson(teacher, learner, read, None, {mine: theirs for theirs, mine in options.pairs()})


def _task(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    evaluation: DataPlace | None,
    task: str,
    options: FitOptions,
    seed: int,
    label_key: str,
) -> Task:
    """A model and the text of its task, or a network of one's own and labelled arrays that fit it."""
    if face.learns_text(place, data):
        return face.task(place, data, evaluation, task, options, seed)
    read = supervised(data, label_key, face, labels=True)
    held = None
    if evaluation is not None:
        held = supervised(evaluation, label_key, face, labels=True, option="--eval")
    opened = face.open(place)
    read = fed.fitted_samples(face, opened, read)
    if held is not None:
        held = fed.fitted_samples(face, opened, held, "--eval")
    batch = read.first(options.batch_size)
    context = CommandContext(face, seed, batch[0], options, read=read, is_hf=opened.is_hf)
    name, loss = context.loss(options.loss)
    _prove(face, opened, name, loss, batch)
    return Task(opened, read, held, name, loss, options, {}, name == "cross_entropy")


def _called(face: JobFramework, opened: Opened, inputs: Any) -> list[Any]:
    """The arrays that a network answers with; whatever it raises is reported with the network's name."""
    try:
        found: list[Any] = face.outputs(opened.model, inputs)
    except SlimkitError:
        raise
    except Exception as error:  # the user's network raises what it likes
        raise ConfigError(fed.uncallable(opened, error)) from error
    if not found:
        raise ConfigError(f"{opened.place.factory or opened.place.model} answers with no tensor")
    return found


def _prove(face: JobFramework, opened: Opened, name: str, loss: ComputeLoss, batch: Any) -> None:
    """Refuse data and a loss that do not fit, on the first batch and before anything changes."""
    _called(face, opened, batch[0])
    try:
        with face.evaluating(opened.model):
            float(loss(opened.model, batch))
    except SlimkitError:
        raise
    except Exception as error:  # the user's loss and labels
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--loss {name} does not fit the data: {type(error).__name__}: {reason}") from error


def _evaluate(face: JobFramework, model: Any, given: Task, batch_size: int) -> dict[str, float]:
    """Mean loss over held-out samples (of text: tokens), with a classifier's accuracy or the perplexity of text."""
    total = right = seen = 0.0
    counted = 0
    assert given.held is not None
    with face.evaluating(model):
        for batch in given.held.batches(batch_size):
            labels = face.arrays(batch[1])[0]
            weight = len(labels) if given.held.tokens is None else given.held.tokens(batch)
            if not weight:
                continue
            total, seen = total + float(given.loss(model, batch)) * weight, seen + weight
            if given.classes:
                right += float((face.outputs(model, batch[0])[0].argmax(1) == labels).sum())
                counted += labels.size
    found = {"loss": total / seen, **({"accuracy": right / counted} if counted else {})}
    if given.held.tokens is not None:
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found
