"""What a model is fed: arrays and batches in the form that it takes, found by one call before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs.framework import JobFramework, Opened, Supervised
from slimkit.core.log import logger

# What arrays of labels are called in files of arrays.
LABELS = ("labels", "label", "y", "target", "targets")

# f(one batch) -> the same in another form
Form = Callable[[Any], Any]


def fitting_form(face: JobFramework, opened: Opened, batch: Any, option: str) -> Form:
    """How batches must be changed so that the model takes them; what is changed is in the log.

    As they are; without labels; a single named array as the only argument; 64-bit floats and the bytes of images as
    32-bit floats. The first form that the model can be called with is taken.

    Args:
        face: the framework.
        opened: the model, which is run once a form.
        batch: one batch of inputs.
        option: what the user gave them by, for messages.

    Returns:
        f(batch) -> batch.

    Raises:
        ConfigError: the model cannot be called with any of them; the message says why.
    """
    first: Exception | None = None
    for said, form in _forms(batch):
        try:
            if not face.outputs(opened.model, form(batch)):
                raise ConfigError("it answers with no tensor")
        except SlimkitError as error:
            first = first or error
        except Exception as error:  # noqa: BLE001 - the user's network raises what it likes
            first = first or error
        else:
            for words in said:
                logger.warning("%s: %s", option, words)
            return form
    assert first is not None
    raise ConfigError(f"{option}: {uncallable(opened, first)}") from first


def uncallable(opened: Opened, error: Exception) -> str:
    """That a network cannot be called with the data, in one line, with the network's name and what it raised."""
    where = opened.place.factory or opened.place.model
    reason = " ".join(str(error).split())[:300]
    kind = "" if isinstance(error, SlimkitError) else f"{type(error).__name__}: "
    return f"{where} cannot be called with the data: {kind}{reason}"


def fitted(face: JobFramework, opened: Opened, batches: Any, option: str) -> Any:
    """All batches in the form that the model takes; batches that fit come back as they are."""
    rows = list(batches)
    if not rows:
        return batches
    form = fitting_form(face, opened, rows[0], option)
    return batches if form is _same else [form(row) for row in rows]


def fitted_samples(face: JobFramework, opened: Opened, read: Supervised, option: str = "--data") -> Supervised:
    """Training data in the form that the network takes."""
    first = read.first(1)
    form = fitting_form(face, opened, first[0] if read.labelled else first, option)
    if form is _same:
        return read

    def formed(batch: Any) -> Any:
        return (form(batch[0]), batch[1]) if read.labelled else form(batch)

    if read.collate is None:
        return replace(read, samples=[formed(batch) for batch in read.samples])
    collate = read.collate
    return replace(read, collate=lambda rows: formed(collate(rows)))


def _same(batch: Any) -> Any:
    return batch


def _forms(batch: Any) -> list[tuple[list[str], Form]]:
    """The forms to try, each with what to say of it, the mildest first."""
    shapes: list[tuple[list[str], Form]] = [([], _same)]
    if isinstance(batch, Mapping):
        names = [name for name in batch if name in LABELS]
        rest = [name for name in batch if name not in LABELS]
        left = [f"{', '.join(names)}: left out, for nothing here reads labels"] if names else []
        if names and rest:
            shapes.append((left, lambda b: {name: b[name] for name in rest}))
        if len(rest) == 1:
            shapes.append((left, lambda b: b[rest[0]]))
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        shapes.append((["the second of each pair is left out, for nothing here reads labels"], lambda b: b[0]))
    found = list(shapes)
    for said, form in shapes:
        words = [said_of for kind, said_of in _NARROWED.items() if _holds(form(batch), kind)]
        if words:
            found.append(([*said, *words], _then(form)))
    return found


def _then(form: Form) -> Form:
    return lambda batch: _narrow(form(batch))


# Element types that few networks take, and what becomes of them.
_NARROWED = {
    "float64": "64-bit floats become 32-bit ones, as the network's weights are",
    "uint8": "bytes become 32-bit floats from 0 to 255; scale them yourself where the network wants others",
}


def _is_narrowed(value: Any, kind: str) -> bool:
    """Whether a tensor is of such a type; bytes only where they are images, with three axes or more."""
    return str(getattr(value, "dtype", "")).lower().endswith(kind) and (kind != "uint8" or value.ndim >= 3)


def _holds(value: Any, kind: str) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(item, kind) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds(item, kind) for item in value)
    return _is_narrowed(value, kind)


def _narrow(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _narrow(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_narrow(item) for item in value)
    return value.float() if any(_is_narrowed(value, kind) for kind in _NARROWED) else value
