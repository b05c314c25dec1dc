"""How a training command trains, what it aims at, and what a text file says about its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.data import DataPlace, ModelPlace

# task -> the class of transformers that has its head
TASKS = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Args:
        epochs: passes over the data.
        learning_rate: peak rate of AdamW.
        batch_size: samples per update.
        weight_decay: decoupled weight decay.
        schedule: "cosine", "linear" or "constant", down to zero or flat.
        warmup: updates until the full rate.
        clip_norm: bound on the norm of all gradients; None for none.
        max_steps: bound on the updates; None for none.
        seed: of the order, of fresh weights and of dropout.
        save_every: updates between two checkpoints.
        restart: throw an unfinished run away.
    """

    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    clip_norm: float | None = 1.0
    max_steps: int | None = None
    seed: int = 0
    save_every: int = 100
    restart: bool = False

    def __post_init__(self) -> None:
        check.choice(self.schedule, ("cosine", "linear", "constant"), "--schedule")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree in."""
        return {k: v for k, v in asdict(self).items() if k not in ("restart", "save_every")}


@dataclass(frozen=True)
class DistillAims:
    """What a student is, and what it learns from its teacher.

    Args:
        sizes: layers, ffn, heads, hidden of a student cut out of a Hugging Face teacher, those that change.
        selection: "importance" or "first": which rows and columns of that teacher stay.
        student: the student of a factory's teacher; None for Hugging Face directories.
        matches: (teacher's layer, student's layer) whose outputs are compared, for factories.
        temperature: softening of logits.
        hidden_weight: weight of each pair of layers; 0 leaves them out.
        output_weight: weight of the term on the outputs; 0 leaves it out.
        output_loss: name of that term, or "auto".
        hard_weight: weight of the loss on labels; 0 needs none.
        loss: that loss: "auto", "cross_entropy", "mse", or a function f(model, batch).
        label_key: the array that holds the labels.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    selection: str = "importance"
    student: ModelPlace | None = None
    matches: tuple[tuple[str, str], ...] = ()
    temperature: float = 2.0
    hidden_weight: float = 1.0
    output_weight: float = 1.0
    output_loss: str = "auto"
    hard_weight: float = 0.0
    loss: str = "auto"
    label_key: str = "labels"

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree in, the student's weights apart."""
        plain = {k: v for k, v in asdict(self).items() if k != "student"}
        student = self.student
        return plain | {"student": None if student is None else [student.factory, dict(student.arguments)]}


@dataclass(frozen=True)
class AdaptAims:
    """Which delta is trained, on what, and how it is written.

    Args:
        task: of a Hugging Face directory: "auto", "classification" or "causal-lm".
        kind: delta kind, for `apply_delta`.
        targets: globs of layers, or None for the kind's default.
        also_train: globs of parameters of the base that train whole.
        settings: options of the kind.
        evaluation: held-out data of the same form, or None.
        format: "slimkit" or "peft".
        merge: also write the merged model into OUT/merged.
        loss: of a factory's network: "auto", "cross_entropy", "mse", or a function f(model, batch).
        label_key: the array that holds the labels.

    Raises:
        ConfigError: the kind cannot be merged, or not be written in that format.
    """

    task: str = "auto"
    kind: str = "lora"
    targets: tuple[str, ...] | None = None
    also_train: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: DataPlace | None = None
    format: str = "slimkit"
    merge: bool = False
    loss: str = "auto"
    label_key: str = "labels"

    def __post_init__(self) -> None:
        # Refused now, and not after hours of training.
        check.choice(self.format, ("slimkit", "peft"), "--format")
        if self.merge and self.kind != "lora":
            raise ConfigError(f"--merge is for --kind lora: nothing else merges into weights. Received: {self.kind}")
        if self.format == "peft" and self.kind not in ("lora", "prefix", "prompt"):
            raise ConfigError(f"--format peft is for --kind lora, prefix or prompt. Received: {self.kind}")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree in."""
        return {
            "kind": self.kind,
            "targets": self.targets,
            "also_train": self.also_train,
            "settings": dict(self.settings),
            "loss": self.loss,
        }


def task_of(task: str, architecture: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The task of a data file: what was asked for, or what its labels and the model's head tell.

    Example:
        >>> task_of("auto", "BertModel", [{"text": "a", "label": 1}])
        'classification'
    """
    check.choice(task, ("auto", *TASKS), "--task")
    if task == "auto":
        task = "classification" if all("label" in row for row in rows) else "causal-lm"
        if task == "causal-lm" and "CausalLM" not in architecture and "LMHead" not in architecture:
            raise ConfigError(
                f"--task: the text has no labels, and {architecture} is no causal language model; every line of a "
                'classification file needs a "label"'
            )
    if task == "classification" and not all("label" in row for row in rows):
        raise ConfigError('--task classification: every line needs a "label"')
    return task


def label_names(rows: Sequence[Mapping[str, Any]], known: Mapping[str, int] | None) -> dict[str, int]:
    """Label -> class number: the model's own names where they cover the data, else the data's in sorted order.

    Example:
        >>> label_names([{"label": "good"}, {"label": "bad"}], {"LABEL_0": 0})
        {'bad': 0, 'good': 1}
    """
    names = {str(row["label"]) for row in rows}
    if known and names <= set(known):
        return dict(known)
    if len(names) < 2:
        raise ConfigError(f"a classification file needs at least two labels. Received: {sorted(names)}")
    numbers = all(name.isdigit() for name in names)
    return {name: at for at, name in enumerate(sorted(names, key=int if numbers else str))}
