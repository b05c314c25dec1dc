"""What a text file says about its task, and which class of transformers has the head for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.documents import is_chat

# task -> the class of transformers that has its head
TASKS = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}


def task_of(task: str, architecture: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The task of a data file: what was asked for, or what its labels and the model's head say.

    Example:
        >>> task_of("auto", "BertModel", [{"text": "a", "label": 1}])
        'classification'
    """
    check.choice(task, ("auto", *TASKS), "--task")
    chats = any(is_chat(row) for row in rows)
    if task == "auto":
        task = "classification" if not chats and all("label" in row for row in rows) else "causal-lm"
        if task == "causal-lm" and "CausalLM" not in architecture and "LMHead" not in architecture:
            raise ConfigError(
                f"--task: the text has no labels, and {architecture} is no causal language model; every line of a "
                'classification file needs a "label"'
            )
    if task == "classification" and (chats or not all("label" in row and "text" in row for row in rows)):
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
