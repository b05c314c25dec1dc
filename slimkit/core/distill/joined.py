"""A teacher and a student joined for training: what the join is given, and what a trainer may ask it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from slimkit.core import check
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.distill.teacher_cache import TeacherFiles


class JoinedModels:
    """A model that knows the value of each term of its loss; a trainer keeps them in the history."""

    @abstractmethod
    def loss_terms(self) -> Mapping[str, Any]:
        """The value of every term in the last forward, without its weight."""


class TotalLoss(JoinedModels):
    """One whose forward returns (soft loss, the student's output, the teacher's), and mixes the hard loss in later."""

    @abstractmethod
    def get_total_loss(self, hard: Any = None) -> Any:
        """The total of the last forward with the student's own loss on the labels."""


def check_pair(
    teacher: Any, student: Any, config: Any, check_model: Callable[[Any, str], Any], word: str
) -> dict[str, Any]:
    """Check what `get_distill_model` is given, by the framework's `check_model` and word for a model.

    Returns:
        The custom losses by name.
    """
    if not isinstance(teacher, TeacherFiles):
        check_model(teacher, "teacher")
    check_model(student, "student")
    check.instance(config, KnowledgeDistillConfig, "config")
    if teacher is student:
        check.wrong_value("teacher", f"another {word} than the student", teacher)
    custom: dict[str, Any] = config.custom_losses
    for name, instance in custom.items():
        check_model(instance, f"custom loss {name!r}")
    return custom
