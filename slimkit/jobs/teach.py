"""Distillation and adaptation as commands: text in, a smaller or adapted model out, resumable after Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge, delta, students, train
from slimkit import distill as distilling
from slimkit.core import files
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.data import DataPlace, ModelPlace
from slimkit.core.jobs.interrupt import SaveOnInterrupt
from slimkit.core.jobs.training import TASKS, TrainingPlan, label_names, task_of
from slimkit.core.jobs.wing import Opened
from slimkit.core.sparse import shards
from slimkit.core.train.callbacks import Checkpoints
from slimkit.core.train.runlog import ProgressBar
from slimkit.core.train.schedules import cosine_schedule, linear_schedule
from slimkit.core.weights.influence import find_stack
from slimkit.jobs import models
from slimkit.jobs.texts import Reader

import torch
from torch import nn

_SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule, "constant": None}

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
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    plan: TrainingPlan,
    *,
    sizes: dict[str, Any],
    selection: str,
    temperature: float,
    hidden_weight: float,
    output_weight: float,
) -> dict[str, Any]:
    """Cut a student out of a teacher and train it to answer and to think like the teacher, on plain text.

    Args:
        place: the teacher, a Hugging Face directory.
        data: text.
        out: the student's folder; None only says what would be done.
        plan: how to train.
        sizes: layers, ffn, heads, hidden of the student, those that change.
        selection: "importance" or "first": which rows and columns of the teacher stay.
        temperature: softening of logits.
        hidden_weight: weight of each layer's hidden-state term; 0 leaves them out.
        output_weight: weight of the term on the outputs; 0 leaves it out.

    Returns:
        What was done, as plain values.
    """
    directory = _directory(place, "distill")
    teacher = models.open_model(place)
    reader = Reader(directory, type(teacher.model), teacher.model.config, data.max_length)
    rows = [row["text"] for row in data.rows()]
    with _seeded(plan.seed):
        student, report = students.make_student(teacher.model, selection=selection, **sizes)
    facts: dict[str, Any] = {
        "teacher_parameters": _size(teacher.model),
        "parameters": _size(student),
        "layers": {str(k): v for k, v in report["layers"].items()},
        "samples": len(rows),
    }
    samples = Samples(reader.encode(rows))
    example = reader.pad(samples.rows[: plan.batch_size])
    config = _comparison(teacher.model, student, report["layers"], example, temperature, hidden_weight, output_weight)
    facts["terms"] = [
        f"{label.label}: {term.func_name}" for label in config.spec().soft_labels for term in label.losses
    ]
    if out is None:
        return facts
    with _seeded(plan.seed):
        dual = distilling.get_distill_model(teacher.model, student, config, inputs=example)
    job = {"command": "distill", "sizes": sizes, "selection": selection, "temperature": temperature}
    job |= {"weights": [hidden_weight, output_weight], "teacher": _digest_folder(directory), "text": _digest(rows)}
    trainer = _fit(dual, samples, reader.pad, plan, out, job, lambda model, batch: bridge.run(model, batch)[0])
    opened = Opened(dual.get_student_model().eval(), place, directory)
    with files.atomic_directory(out) as folder:
        facts |= {"written": models.write_model(opened, folder), **_curve(trainer)}
        folders.write_report(folder, "distill", facts)
    return facts


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _comparison(
    teacher: nn.Module,
    student: nn.Module,
    layers: dict[int, int],
    example: dict[str, Any],
    temperature: float,
    hidden_weight: float,
    output_weight: float,
) -> KnowledgeDistillConfig:
    """Outputs against outputs, and each student block against the teacher block it came from."""
    config = KnowledgeDistillConfig()
    mask = "attention_mask" if "attention_mask" in example else None
    with bridge.evaluating(teacher):
        outputs = bridge.run(teacher, example)
    if output_weight:
        key = "logits" if "logits" in outputs else "last_hidden_state"
        term: dict[str, Any] = {"func_name": "HiddenMse", "func_weight": output_weight}
        if key == "logits":
            term = {
                "func_name": "KDKLDiv", "func_weight": output_weight, "temperature": temperature, "t_squared": True,
            }  # fmt: skip
        label: dict[str, Any] = {"t_output_idx": key, "s_output_idx": key, "loss_func": [term]}
        config.add_output_soft_label({**label, **({"mask": mask} if mask and outputs[key].ndim == 3 else {})})
    if hidden_weight:
        theirs, mine = _blocks(teacher), _blocks(student)
        for at, path in enumerate(mine):
            label = {
                "t_module": theirs[layers.get(at, at)], "s_module": path, "t_output_idx": 0, "s_output_idx": 0,
                "loss_func": [{"func_name": "HiddenMse", "func_weight": hidden_weight}],
            }  # fmt: skip
            config.add_inter_soft_label(label)
    if not output_weight and not hidden_weight:
        raise ConfigError("--hidden-weight and --output-weight are both 0: there is nothing to learn from")
    return config


def _blocks(model: nn.Module) -> list[str]:
    modules = {n: m for n, m in model.named_modules() if n}
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items()}
    return find_stack({n: type(m).__name__ for n, m in modules.items()}, sizes)


def adapt(
    place: ModelPlace,
    data: DataPlace,
    out: Path | None,
    plan: TrainingPlan,
    *,
    task: str,
    kind: str,
    targets: list[str] | None,
    settings: dict[str, Any],
    evaluation: DataPlace | None,
    format: str,
    merge: bool,
) -> dict[str, Any]:
    """Train a delta on a frozen model with a text file, and save it as a bundle.

    Args:
        place: the base, a Hugging Face directory.
        data: text; for classification each line needs a "label".
        out: the bundle's folder; None only says what would be done.
        plan: how to train.
        task: "auto", "classification" or "causal-lm".
        kind: delta kind, for `apply_delta`.
        targets: globs of layers, or None for the kind's default.
        settings: options of the kind.
        evaluation: held-out text of the same form, or None.
        format: "slimkit" or "peft".
        merge: also write the merged model into OUT/merged.

    Returns:
        What was done, as plain values.
    """
    directory = _directory(place, "adapt")
    # Refused now, and not after hours of training.
    if merge and kind != "lora":
        raise ConfigError(f"--merge is for --kind lora: nothing else becomes part of the weights. Received: {kind}")
    if format == "peft" and kind not in ("lora", "prefix", "prompt"):
        raise ConfigError(f"--format peft is for --kind lora, prefix or prompt. Received: {kind}")
    rows = data.rows()
    config, architecture = models.architecture(directory)
    chosen = task_of(task, architecture.__name__, rows)
    labels = label_names(rows, getattr(config, "label2id", None)) if chosen == "classification" else {}
    with _seeded(plan.seed):
        opened = models.open_model(place, kind=TASKS[chosen], fresh=HEADS, **head(labels))
    reader = Reader(directory, type(opened.model), opened.model.config, data.max_length)
    if getattr(opened.model.config, "pad_token_id", None) is None:
        opened.model.config.pad_token_id = reader.tokenizer.pad_token_id
    samples = Samples(_labelled(reader, rows, labels))
    held = None if evaluation is None else Samples(_labelled(reader, evaluation.rows(), labels))
    with _seeded(plan.seed):
        told = _put_on(opened.model, kind, targets, settings, with_head=bool(labels))
    total = _size(opened.model)
    trained = sum(p.numel() for p in opened.model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "task": chosen,
        "labels": labels,
        "fresh": list(opened.fresh),
        "kind": kind,
        "layers": sorted(told.layers),
        "parameters": total,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "samples": len(samples),
    }
    if out is None:
        return facts
    job = {"command": "adapt", "task": chosen, "kind": kind, "targets": targets, "settings": settings}
    job |= {"base": _digest_folder(directory), "text": _digest([repr(sorted(r.items())) for r in rows])}
    pad = _padding(reader, chosen)
    trainer = _fit(opened.model, samples, pad, plan, out, job, lambda model, batch: model(**batch).loss)
    facts |= _curve(trainer)
    if held is not None:
        facts["evaluation"] = _evaluate(opened.model, held, pad, plan.batch_size, chosen)
    with files.atomic_directory(out) as folder:
        delta.save_delta(opened.model, folder, format=format)
        facts["delta_bytes"] = sum(f.stat().st_size for f in folder.iterdir())
        if merge:
            delta.merge_delta(opened.model, unload=True)
            (folder / "merged").mkdir()
            facts["written"] = models.write_model(opened, folder / "merged")
        folders.write_report(folder, "adapt", facts)
    return facts


def _put_on(
    model: nn.Module, kind: str, targets: list[str] | None, settings: dict[str, Any], *, with_head: bool
) -> Any:
    """The delta on its layers; a classification head trains whole, and a delta on it would only stand in its way."""
    names = [n for n, _ in model.named_parameters()]
    heads = [f"*{h}*" for h in HEADS if with_head and any(h in n for n in names)] or None
    if heads and kind not in ("prefix", "prompt"):
        settings = {"exclude": heads, **settings}
    return delta.apply_delta(model, kind, targets, also_train=heads, **settings)


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


def _fit(
    model: nn.Module, samples: Samples, pad: Any, plan: TrainingPlan, out: Path, job: dict[str, Any], loss: Any
) -> train.Trainer:
    """Train what wants a gradient, going on from an earlier checkpoint of the same job where there is one."""
    state = out / folders.STATE
    if plan.restart and state.is_dir():
        shutil.rmtree(out)
    folders.unused(out, state=folders.STATE)
    shards.same_job(state, {**job, "plan": plan.identity()})
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    stop = SaveOnInterrupt(state / "last")
    keep = Checkpoints(state, metric=None, every_n_steps=plan.save_every)
    schedule = _SCHEDULES[plan.schedule]
    trainer = train.Trainer(model, optimizer=optimizer, compute_loss=loss, callbacks=[ProgressBar(), keep, stop])
    try:
        trainer.train(
            samples,
            num_epochs=plan.epochs,
            per_device_batch_size=plan.batch_size,
            gradient_clip_norm=plan.clip_norm,
            create_scheduler_fn=None if schedule is None else schedule(plan.warmup),
            max_num_train_steps=plan.max_steps,
            seed=plan.seed,
            collate_fn=pad,
            resume_from=state / "last" if (state / "last").exists() else None,
        )
    finally:
        stop.restore()
    return trainer


def _curve(trainer: train.Trainer) -> dict[str, Any]:
    losses = [float(v) for v in trainer.run_history.get_metric_values("train_loss_epoch")]
    if not all(map(math.isfinite, losses)):
        raise ConfigError(f"the loss became {losses[-1]}: give a lower --lr and --restart; nothing was saved")
    return {"steps": trainer.global_step, "loss_by_epoch": losses}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw the same values whenever the same command is given, without disturbing anybody else's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _directory(place: ModelPlace, command: str) -> Path:
    if place.factory is not None or place.model is None or not place.model.is_dir():
        raise ConfigError(
            f"`slimkit {command}` needs a Hugging Face directory as --model, with its tokenizer; for other networks "
            "write a recipe (`slimkit run`), which takes any model, data and loss"
        )
    return place.model


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _digest_folder(directory: Path) -> dict[str, str]:
    return {f.name: files.digest_file(f) for f in sorted(directory.glob("*.safetensors"))}
