"""Which tensors can be compared: picking outputs, checking shapes, and where an unequal width needs a projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.distill.config import LOSSES, Index, SoftLabel
from slimkit.core.errors import ConfigError

Shape = tuple[int, ...]


def pick(value: Any, index: Index, where: str) -> Any:
    """One tensor out of what a module returned.

    Args:
        value: a tensor, or a tuple, list or mapping of them, nested.
        index: a position, a key, a path of both, or None (the value itself, or its only element).
        where: how a message calls the module.

    Raises:
        ConfigError: there is no such output, or it is no tensor.

    Example:
        >>> pick({"a": [1.5, 2.5]}, ("a", 1), "output")
        2.5
    """
    steps = index if isinstance(index, tuple) else (index,)
    for step in steps:
        value = _step(value, step, where)
    if value is None or isinstance(value, (tuple, list, Mapping)):
        kind = type(value).__name__
        raise ConfigError(f"{where}: output {index!r} is a {kind}, not one tensor; say which by index or key")
    return value


def _step(value: Any, step: int | str | None, where: str) -> Any:
    nested = isinstance(value, (tuple, list, Mapping))
    if step is None or (not nested and step == 0):
        return (
            next(iter(value.values() if isinstance(value, Mapping) else value)) if nested and len(value) == 1 else value
        )
    if isinstance(step, str):
        if isinstance(value, Mapping) and step in value:
            return value[step]
        if not isinstance(value, Mapping) and hasattr(value, "_fields") and hasattr(value, step):
            return getattr(value, step)
        known = list(value) if isinstance(value, Mapping) else []
        raise ConfigError(f"{where} has no output {step!r}{check.near(step, known)} (keys: {known})")
    items = list(value.values()) if isinstance(value, Mapping) else value if nested else [value]
    if not -len(items) <= step < len(items):
        raise ConfigError(f"{where} has {len(items)} outputs; index {step} is out of range")
    return items[step]


def check_shapes(label: SoftLabel, student: Shape, teacher: Shape, *, projected: tuple[int, int] | None) -> bool:
    """Refuse tensors that the label's losses cannot compare.

    Args:
        label: the soft label.
        student, teacher: shapes of the two tensors, batch first, before pooling.
        projected: (student's, teacher's) width of a projection that exists already, or None.

    Returns:
        Whether a projection from the student's width to the teacher's is needed.

    Raises:
        ConfigError: names the label, the loss and both shapes.
    """
    where = f"{label.label}: student {student} against teacher {teacher}"
    if label.shape is not None and tuple(teacher[-len(label.shape) :]) != label.shape:
        raise ConfigError(f"{where}: config['shape'] says {label.shape}")
    if label.pool is not None:
        if len(student) != 3 or len(teacher) != 3:
            raise ConfigError(f"{where}: pool needs (batch, length, width)")
        student, teacher = (student[0], student[2]), (teacher[0], teacher[2])
    needed = False
    for term in label.losses:
        kind = LOSSES.get(term.func_name, ("custom",))[0]
        message = f"{where}: {term.func_name} "
        if kind == "logits" and student != teacher:
            raise ConfigError(message + "needs equal shapes")
        if kind == "hidden":
            axis = 1 if len(student) == 4 else -1
            if _without(student, axis) != _without(teacher, axis) or len(student) < 2:
                raise ConfigError(message + "needs shapes that differ in width alone")
            needed |= student[axis] != teacher[axis]
            if projected is not None and projected != (student[axis], teacher[axis]):
                raise ConfigError(f"{where}: its projection is for widths {projected}")
        if kind == "relation":
            flat = len(student) == 2 and len(teacher) == 2
            if student[:1] != teacher[:1] or (
                not flat and (len(student) not in (3, 4) or _places(student) != _places(teacher))
            ):
                raise ConfigError(
                    message + "needs (batch, width), (batch, length, width) or (batch, width, h, w) of equal places"
                )
            heads = term.func_param[0] if term.func_param else 1
            for width in (student[1 if len(student) == 4 else -1], teacher[1 if len(teacher) == 4 else -1]):
                if term.func_name == "Relation" and width % heads:
                    raise ConfigError(message + f"cannot split width {width} into {heads} heads")
            if term.func_name == "MMD" and term.func_param and (not flat or student[0] % heads):
                raise ConfigError(message + f"cannot split the first axis into {heads} samples")
        if kind == "attention":
            ends = student[-2:] == teacher[-2:] and student[0] == teacher[0]
            if not ends or len(student) != len(teacher) or len(student) not in (3, 4):
                raise ConfigError(message + "needs attention maps (batch, heads, queries, keys) of equal length")
    return bool(needed)


def check_mask(label: SoftLabel, mask: Shape, student: Shape) -> None:
    """Refuse a mask that has not one value for each row of the student's tensor.

    Args:
        label: the soft label.
        mask: the mask's shape.
        student: shape of the student's tensor, batch first, before pooling.

    Raises:
        ConfigError: names the label and both shapes.
    """
    attention = any(LOSSES.get(term.func_name, ("",))[0] == "attention" for term in label.losses)
    custom = any(term.func_name not in LOSSES for term in label.losses)
    rows = (student[0], student[-1]) if attention else student[:-1]
    if not custom and int(np.prod(mask)) != int(np.prod(rows)):
        raise ConfigError(
            f"{label.label}: mask {label.mask!r} must have one value for each row of the student's {student}, shape "
            f"{rows}. Received: {mask}"
        )


def _without(shape: Shape, axis: int) -> Shape:
    places = list(shape)
    del places[axis]
    return tuple(places)


def _places(shape: Shape) -> int:
    return int(np.prod(shape[2:] if len(shape) == 4 else shape[1:-1]))


def projection_values(student_width: int, teacher_width: int, place: int) -> np.ndarray[Any, Any]:
    """Starting values of a projection, (teacher width, student width), the same in both wings.

    Normal with variance 1 / student width, so that a projected state keeps its size.
    """
    rng = np.random.default_rng([student_width, teacher_width, place])
    return (rng.standard_normal((teacher_width, student_width)) / np.sqrt(student_width)).astype(np.float32)
