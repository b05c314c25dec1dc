"""Text for the commands that train: tokenised by a Hugging Face directory's own tokenizer, with the head it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from slimkit import bridge, students
from slimkit.chain import stack_of
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.distill.masks import IGNORED
from slimkit.core.errors import ArgumentError, ConfigError
from slimkit.core.jobs import fed
from slimkit.core.jobs.documents import is_chat
from slimkit.core.jobs.framework import JobFramework, Lesson, Opened, Supervised, Task
from slimkit.core.jobs.options import AdaptOptions, DistillOptions, FitOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace
from slimkit.core.jobs.tasks import TASKS, label_names, task_of
from slimkit.jobs import models
from slimkit.jobs.texts import Reader

import torch
from torch import nn

# Tokens on which blocks and channels of a student are chosen, from all over the data.
MEASURED = 4096

# What language models learn best from, measured on SmolLM2 (docs/distill.md): the logits as they are, and no layers.
LANGUAGE_TEMPERATURE, LANGUAGE_HIDDEN = 1.0, 0.0

# Words in the names of classification heads in transformers; such a head is fresh on a base model and trains whole.
HEADS = ("classifier", "score")


def lesson(
    face: JobFramework, place: ModelPlace, data: DataPlace, options: DistillOptions, cut: StudentPlace, seed: int
) -> Lesson:
    """A student, cut out of its teacher or in a folder of its own, that learns on plain text to answer like it.

    Args:
        face: PyTorch's side of the jobs.
        place: the teacher, a Hugging Face directory.
        data: text.
        options: the terms.
        cut: the student's sizes, or its folder.
        seed: of what the teacher has nothing for.

    Raises:
        ConfigError: options of networks of one's own, nothing that makes the student smaller, or a student that does
            not answer in the teacher's vocabulary or has no blocks to compare.
    """
    own = cut.place is not None and (cut.place.factory is not None or cut.place.arguments)
    if own or options.match or options.hard_weight or options.output_loss != "auto":
        raise ConfigError(
            "--student-factory, --student-arg, --match, --hard-weight and --output-loss are for --factory"
        )
    sized = bool(cut.sizes) or cut.layer_map is not None
    if cut.place is not None and (sized or cut.selection != "importance"):
        raise ConfigError(
            "--student is a model that is small already: --layers, --layer-map, --ffn, --heads, --hidden and "
            "--selection cut one out of the teacher"
        )
    if cut.place is None and not sized:
        raise ConfigError(
            "give --student FOLDER, such as the pruned teacher, or at least one of --layers, --layer-map, --ffn, "
            "--heads and --hidden: what makes the student smaller"
        )
    teacher = face.open(place)
    assert teacher.directory is not None
    reader = Reader(teacher.directory, type(teacher.model), teacher.model.config, data.max_length)
    rows = data.rows(chats=True)
    example = face.own_example(teacher, 2, seed)
    fed.fitting_form(face, teacher, example, "the example that the model describes")
    with bridge.evaluating(teacher.model):
        outputs = bridge.run(teacher.model, example)
    language = "logits" in outputs and outputs["logits"].ndim == 3
    read = _to_imitate(reader, rows, language)
    fed.fitting_form(face, teacher, read.first(1), "--data")
    if cut.place is not None:
        learner, layers = _own_student(face, teacher, cut.place)
    else:
        seen = read.spread(max(1, MEASURED // reader.max_length), options.batch_size)
        sizes: dict[str, Any] = dict(cut.sizes)
        with face.seeded(seed):
            student, report = students.make_student(
                teacher.model, selection=cut.selection, layer_map=cut.layer_map, calibration=seen, **sizes
            )
        learner, layers = Opened(student.eval(), place, teacher.directory), report["layers"]
    config = _comparison(teacher.model, learner.model, layers, outputs, "attention_mask" in read.first(1), options)
    return Lesson(teacher, learner, read, config, {str(k): v for k, v in layers.items()})


def _own_student(face: JobFramework, teacher: Opened, place: ModelPlace) -> tuple[Opened, dict[int, int]]:
    """The student in a folder, and which of the teacher's blocks each of its own learns from: none where their numbers
    differ."""
    learner = face.open(place)
    mine, theirs = (getattr(getattr(x.model, "config", None), "vocab_size", None) for x in (learner, teacher))
    if mine != theirs:
        raise ConfigError(
            f"--student {place.model} must have the teacher's vocabulary of {theirs} tokens, which it reads and "
            f"answers in; TeacherCache.build(vocabulary=...) in Python maps another. Received: {mine}"
        )
    count, known = _blocks(learner.model), _blocks(teacher.model)
    return learner, {i: i for i in range(count)} if count == known else {}


def _blocks(model: nn.Module) -> int:
    """How many blocks a model has; 0 where it is no stack of them."""
    try:
        return len(stack_of(model))
    except ArgumentError:
        return 0


def _to_imitate(reader: Reader, rows: list[dict[str, Any]], language: bool) -> Supervised:
    """Text as batches of inputs: a language model's documents in windows, another model's in pieces."""
    identity = {"text": _digest([repr(sorted(row.items())) for row in rows]), "length": reader.max_length}
    if not language:
        if any(is_chat(row) for row in rows):
            raise ConfigError("conversations are for language models; give lines with a text")
        encoded = reader.pieces([row["text"] for row in rows])
        return Supervised(
            range(len(encoded)), lambda at: reader.pad([encoded[i] for i in at]), len(encoded), identity, False,
            tokens=_real, even=False, facts={"documents": len(rows)},
        )  # fmt: skip
    windows = reader.windows(rows)
    even = not any(is_chat(row) for row in rows)
    length = reader.max_length if even and len(windows) > 1 else None
    return Supervised(
        range(len(windows)), lambda at: reader.labelled([windows[i] for i in at], length)[0], len(windows), identity,
        False, tokens=_real, even=even, facts={"documents": len(rows), "tokens": sum(len(w.ids) for w in windows)},
    )  # fmt: skip


def _real(inputs: dict[str, torch.Tensor]) -> float:
    """How many tokens of a batch are no padding."""
    return float(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel())


def _comparison(
    teacher: nn.Module,
    student: nn.Module,
    layers: dict[int, int],
    outputs: Mapping[str, Any],
    masked: bool,
    options: DistillOptions,
) -> KnowledgeDistillConfig:
    """Outputs against outputs, and each student block against the teacher block it came from; padding never counts."""
    config = KnowledgeDistillConfig()
    key = "logits" if "logits" in outputs else "last_hidden_state"
    language = key == "logits" and outputs[key].ndim == 3
    mask = {"mask": "attention_mask"} if masked else {}
    if options.output_weight:
        term: dict[str, Any] = {"func_name": "HiddenRelative", "func_weight": options.output_weight}
        if key == "logits":
            heat = LANGUAGE_TEMPERATURE if language and options.temperature is None else options.warmth
            term |= {"func_name": "KDKLDiv", "temperature": heat, "t_squared": True}
        label: dict[str, Any] = {"t_output_idx": key, "s_output_idx": key, "loss_func": [term]}
        config.add_output_soft_label({**label, **(mask if outputs[key].ndim == 3 else {})})
    weight = options.hidden_weight
    if weight is None:
        weight = LANGUAGE_HIDDEN if language else 1.0
    if weight:
        if not layers:
            raise ConfigError(
                "--student and its teacher must have as many blocks where layers are compared; --hidden-weight 0 "
                f"compares the outputs alone. Received: {_blocks(student)} and {_blocks(teacher)}"
            )
        theirs, mine = stack_of(teacher), stack_of(student)
        for at, path in enumerate(mine):
            label = {
                "t_module": theirs[layers.get(at, at)], "s_module": path, "t_output_idx": 0, "s_output_idx": 0, **mask,
                "loss_func": [{"func_name": "HiddenRelative", "func_weight": weight / len(mine)}],
            }  # fmt: skip
            config.add_inter_soft_label(label)
    if not options.output_weight and not weight:
        raise ConfigError("--hidden-weight and --output-weight are both 0: there is nothing to learn from")
    return config


def task(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    held: DataPlace | None,
    asked: str,
    options: FitOptions,
    seed: int,
) -> Task:
    """Open a Hugging Face directory with the head that a text file's task needs, and read the file.

    Args:
        face: PyTorch's side of the jobs.
        place: the base.
        data: text; for classification each line needs a "label".
        held: held-out text of the same form.
        asked: "auto", "classification" or "causal-lm".
        options: of the job; beside a delta a classification head trains whole, and a delta on it would only stand in
            its way.
        seed: of a fresh head.
    """
    if options.loss is not None:
        raise ConfigError("--loss is for arrays; text has the loss of its --task")
    assert place.model is not None
    rows = data.rows(chats=True)
    config, architecture = models.architecture(place.model)
    chosen = task_of(asked, architecture.__name__, rows)
    labels = label_names(rows, getattr(config, "label2id", None)) if chosen == "classification" else {}
    with face.seeded(seed):
        opened = models.open_model(place, kind=TASKS[chosen], fresh=HEADS, **head(labels))
    reader = Reader(place.model, type(opened.model), opened.model.config, data.max_length)
    if getattr(opened.model.config, "pad_token_id", None) is None:
        opened.model.config.pad_token_id = reader.tokenizer.pad_token_id
    names = [n for n, _ in opened.model.named_parameters()]
    heads = [f"*{h}*" for h in HEADS if labels and any(h in n for n in names)]
    if heads and isinstance(options, AdaptOptions):
        more: dict[str, Any] = {"also_train": [*heads, *(options.also_train or ())]}
        if options.kind not in ("prefix", "prompt") and options.exclude is None:
            more["exclude"] = heads
        options = options.model_copy(update=more)
    held_out = None if held is None else _read(reader, held.rows(chats=True), labels)
    read = _read(reader, rows, labels)
    return Task(opened, read, held_out, chosen, _own_loss, options, labels, bool(labels))


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a model of transformers has for its task."""
    inputs, labels = bridge.to_device(batch, bridge.device_of(model))
    loss: torch.Tensor = model(**inputs, labels=labels).loss
    return loss


def head(labels: dict[str, int]) -> dict[str, Any]:
    """What a configuration says of a classification head; nothing for another task."""
    if not labels:
        return {}
    return {"num_labels": len(labels), "label2id": labels, "id2label": {v: k for k, v in labels.items()}}


def _read(reader: Reader, rows: list[dict[str, Any]], labels: dict[str, int]) -> Supervised:
    """Rows of text as batches with labels: the class, or for language models the tokens that are learned."""
    identity = {"text": _digest([repr(sorted(row.items())) for row in rows]), "length": reader.max_length}
    if not labels:
        windows = reader.windows(rows)

        def window(at: list[int]) -> Any:
            return reader.labelled([windows[i] for i in at])

        facts = {"documents": len(rows), "tokens": sum(len(w.ids) for w in windows)}
        return Supervised(range(len(windows)), window, len(windows), identity, True, True, tokens=_told, facts=facts)
    for row in rows:
        if str(row.get("label")) not in labels:
            raise ConfigError(f"a label of the data is not among {sorted(labels)}. Received: {row.get('label')!r}")
    encoded = reader.encode([row["text"] for row in rows])

    def collate(at: list[int]) -> Any:
        inputs = reader.pad([encoded[i] for i in at])
        return inputs, torch.tensor([labels[str(rows[i]["label"])] for i in at])

    return Supervised(range(len(rows)), collate, len(rows), identity, True, True)


def _told(batch: Any) -> float:
    """How many tokens of a batch are learned from."""
    return float((batch[1] != IGNORED).sum())


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
