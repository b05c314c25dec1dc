"""Distillation and adaptation as commands: text in, a smaller or adapted model out, resumable after Ctrl-C."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from slimkit import bridge, delta, students
from slimkit import distill as distilling
from slimkit.core import files
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import fitting, folders, training, work
from slimkit.core.jobs.fields import flag_of
from slimkit.core.jobs.framework import FitRun, JobFramework, Opened
from slimkit.core.jobs.options import AdaptOptions, DistillOptions, FitOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace
from slimkit.core.jobs.tasks import TASKS, label_names, task_of
from slimkit.core.weights.influence import find_stack
from slimkit.jobs import models
from slimkit.jobs.texts import Reader

import torch
from torch import nn

# The label of a position that no loss looks at, in torch and transformers.
_IGNORED = -100

# Words in the names of classification heads in transformers; such a head is fresh on a base model and trains whole.
HEADS = ("classifier", "score")


class Samples(torch.utils.data.Dataset):
    """Tokenised samples, one mapping each."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def distill(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    options: DistillOptions,
    cut: StudentPlace,
    run: FitRun,
) -> dict[str, Any]:
    """Cut a student out of a teacher and train it to answer and to think like the teacher, on plain text.

    Args:
        face: PyTorch's side of the jobs.
        place: the teacher, a Hugging Face directory.
        data: text.
        out: the student's folder; None only says what would be done.
        options: the terms, and how to train.
        cut: the student's sizes.
        run: how the state is kept.

    Returns:
        What was done, as plain values.
    """
    if not cut.sizes:
        raise ConfigError("give at least one of --layers, --ffn, --heads and --hidden: what makes the student smaller")
    if cut.place is not None or options.match or options.hard_weight or options.output_loss != "auto":
        raise ConfigError(
            "--student-factory, --student, --student-arg, --match, --hard-weight and --output-loss are for --factory"
        )
    directory = place.model
    assert directory is not None
    teacher = face.open(place)
    reader = Reader(directory, type(teacher.model), teacher.model.config, data.max_length)
    rows = [row["text"] for row in data.rows()]
    with face.seeded(run.seed):
        sizes: dict[str, Any] = dict(cut.sizes)
        student, report = students.make_student(teacher.model, selection=cut.selection, **sizes)
    facts: dict[str, Any] = {
        "teacher_parameters": work.count(face, teacher.model),
        "parameters": work.count(face, student),
        "layers": {str(k): v for k, v in report["layers"].items()},
        "samples": len(rows),
    }
    samples = Samples(reader.encode(rows))
    example = reader.pad(samples.rows[: options.batch_size])
    config = _comparison(teacher.model, student, report["layers"], example, options)
    facts["terms"] = work.terms(config)
    if out is None:
        return facts
    with face.seeded(run.seed):
        dual = distilling.get_distill_model(teacher.model, student, config, inputs=example)
    job = {"command": "distill", **training.identity(options), **cut.identity()}
    job |= {"teacher": _digest_folder(directory), "text": _digest(rows)}
    facts |= _fit(face, dual, options, samples, face.soft_loss, out, run, job, reader.pad)
    opened = Opened(dual.get_student_model().eval(), place, directory)
    with files.atomic_directory(out) as folder:
        facts["written"] = models.write_model(opened, folder)
        folders.write_report(folder, "distill", facts)
    return facts


def _fit(
    face: JobFramework,
    model: nn.Module,
    options: FitOptions,
    samples: Samples,
    loss: Any,
    out: Path,
    run: FitRun,
    job: dict[str, Any],
    collate: Any,
) -> dict[str, Any]:
    def spell(key: str) -> str:
        return flag_of(type(options), key).names[0]

    fitted = fitting.fit_resumably(face, model, options, samples, loss, out, run, job, spell=spell, collate=collate)
    return {key: fitted[key] for key in ("steps", "loss_by_epoch")}


def _comparison(
    teacher: nn.Module,
    student: nn.Module,
    layers: dict[int, int],
    example: dict[str, Any],
    options: DistillOptions,
) -> KnowledgeDistillConfig:
    """Outputs against outputs, and each student block against the teacher block it came from."""
    config = KnowledgeDistillConfig()
    mask = "attention_mask" if "attention_mask" in example else None
    with bridge.evaluating(teacher):
        outputs = bridge.run(teacher, example)
    if options.output_weight:
        key = "logits" if "logits" in outputs else "last_hidden_state"
        term: dict[str, Any] = {"func_name": "HiddenMse", "func_weight": options.output_weight}
        if key == "logits":
            term |= {"func_name": "KDKLDiv", "temperature": options.temperature, "t_squared": True}
        label: dict[str, Any] = {"t_output_idx": key, "s_output_idx": key, "loss_func": [term]}
        config.add_output_soft_label({**label, **({"mask": mask} if mask and outputs[key].ndim == 3 else {})})
    if options.hidden_weight:
        theirs, mine = _blocks(teacher), _blocks(student)
        for at, path in enumerate(mine):
            label = {
                "t_module": theirs[layers.get(at, at)], "s_module": path, "t_output_idx": 0, "s_output_idx": 0,
                "loss_func": [{"func_name": "HiddenMse", "func_weight": options.hidden_weight}],
            }  # fmt: skip
            config.add_inter_soft_label(label)
    if not options.output_weight and not options.hidden_weight:
        raise ConfigError("--hidden-weight and --output-weight are both 0: there is nothing to learn from")
    return config


def _blocks(model: nn.Module) -> list[str]:
    modules = {n: m for n, m in model.named_modules() if n}
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items()}
    return find_stack({n: type(m).__name__ for n, m in modules.items()}, sizes)


def adapt(
    face: JobFramework,
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    options: AdaptOptions,
    run: FitRun,
    *,
    task: str,
    evaluation: DataPlace | None,
    format: str,
    merge: bool,
) -> dict[str, Any]:
    """Train a delta on a frozen model with a text file, and save it as a bundle.

    Args:
        face: PyTorch's side of the jobs.
        place: the base, a Hugging Face directory.
        data: text; for classification each line needs a "label".
        out: the bundle's folder; None only says what would be done.
        options: which delta, and how to train.
        run: how the state is kept.
        task: "auto", "classification" or "causal-lm".
        evaluation: held-out text of the same form.
        format: "slimkit" or "peft".
        merge: also write the merged model into OUT/merged.

    Returns:
        What was done, as plain values.
    """
    if options.loss is not None:
        raise ConfigError("--loss is for arrays; text has the loss of its --task")
    directory = place.model
    assert directory is not None
    rows = data.rows()
    config, architecture = models.architecture(directory)
    chosen = task_of(task, architecture.__name__, rows)
    labels = label_names(rows, getattr(config, "label2id", None)) if chosen == "classification" else {}
    with face.seeded(run.seed):
        opened = models.open_model(place, kind=TASKS[chosen], fresh=HEADS, **head(labels))
    reader = Reader(directory, type(opened.model), opened.model.config, data.max_length)
    if getattr(opened.model.config, "pad_token_id", None) is None:
        opened.model.config.pad_token_id = reader.tokenizer.pad_token_id
    samples = Samples(_labelled(reader, rows, labels))
    held = None
    if evaluation is not None:
        held = Samples(_labelled(reader, evaluation.rows(), labels))
    with face.seeded(run.seed):
        told = _put_on(opened.model, options, with_head=bool(labels))
    facts: dict[str, Any] = {
        "task": chosen,
        "labels": labels,
        "fresh": list(opened.fresh),
        "kind": options.kind,
        "layers": sorted(told.layers),
        **fitting.share(face.sizes(opened.model)),
        "samples": len(samples),
    }
    if out is None:
        return facts
    job = {"command": "adapt", "task": chosen, **training.identity(options)}
    job |= {"base": _digest_folder(directory), "text": _digest([repr(sorted(r.items())) for r in rows])}
    pad = _padding(reader, chosen)
    facts |= _fit(face, opened.model, options, samples, lambda model, batch: model(**batch).loss, out, run, job, pad)
    if held is not None:
        facts["evaluation"] = _evaluate(opened.model, held, pad, options.batch_size, chosen)
    return training.write_adapted(face, opened, out, facts, format=format, merge=merge)


def _put_on(model: nn.Module, options: AdaptOptions, *, with_head: bool) -> Any:
    """The delta on its layers; a classification head trains whole, and a delta on it would only stand in its way."""
    names = [n for n, _ in model.named_parameters()]
    heads = [f"*{h}*" for h in HEADS if with_head and any(h in n for n in names)]
    arguments = options.arguments()
    if heads and options.kind not in ("prefix", "prompt"):
        arguments = {"exclude": heads, **arguments}
    arguments["also_train"] = [*heads, *(options.also_train or ())] or None
    return delta.apply_delta(model, **arguments)


def head(labels: dict[str, int]) -> dict[str, Any]:
    """What a configuration says of a classification head; nothing for another task."""
    if not labels:
        return {}
    return {"num_labels": len(labels), "label2id": labels, "id2label": {v: k for k, v in labels.items()}}


def _labelled(reader: Reader, rows: list[dict[str, Any]], labels: dict[str, int]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = [dict(s) for s in reader.encode([row["text"] for row in rows])]
    if labels:
        for sample, row in zip(samples, rows):
            if str(row.get("label")) not in labels:
                raise ConfigError(
                    f"a label of the evaluation is not among {sorted(labels)}. Received: {row.get('label')!r}"
                )
            sample["labels"] = labels[str(row["label"])]
    return samples


def _padding(reader: Reader, task: str) -> Any:
    """Samples as a padded batch with labels: the class, or for language models the tokens themselves."""

    def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
        plain = [{k: v for k, v in s.items() if k != "labels"} for s in samples]
        batch = reader.pad(plain)
        if task == "classification":
            return {**batch, "labels": torch.tensor([s["labels"] for s in samples])}
        # The mask, not the token, says what is padding: a padding token may well be the end-of-text token.
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)}

    return pad


def _evaluate(model: nn.Module, held: Samples, pad: Any, batch_size: int, task: str) -> dict[str, float]:
    """Mean loss over samples, with the accuracy of a classifier."""
    loss = right = 0.0
    with bridge.evaluating(model):
        for at in range(0, len(held), batch_size):
            batch = bridge.to_device(pad(held.rows[at : at + batch_size]), bridge.device_of(model))
            found = model(**batch)
            n = len(batch["labels"])
            loss += float(found.loss) * n
            right += float((found.logits.argmax(-1) == batch["labels"]).sum()) if task == "classification" else 0.0
    return {"loss": loss / len(held), **({"accuracy": right / len(held)} if task == "classification" else {})}


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _digest_folder(directory: Path) -> dict[str, str]:
    return {f.name: files.digest_file(f) for f in sorted(directory.glob("*.safetensors"))}
