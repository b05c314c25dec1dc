"""Calibration data as the commands read it: text by a model's tokenizer, arrays, functions; and its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core.calibration import OWN
from slimkit.core.calibration.documents import TextSource
from slimkit.core.calibration.drawing import shares
from slimkit.core.calibration.sets import CalibrationSet, drawn_set, window_form
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.sources import DataPlace, read_documents

if TYPE_CHECKING:
    from slimkit.core.jobs.framework import JobFramework, Opened

Array = np.ndarray[Any, Any]
# f(rows, tokens a row, start token) -> rows of tokens that the dense model wrote
Writes = Callable[[int, int, int | None], Sequence[Any]]


@dataclass(frozen=True)
class TextReader:
    """How a model reads text.

    Args:
        tokenizer: its own.
        max_length: tokens that it takes at most.
        causal: whether it is a language model that reads from left to right, which may see packed documents.
        make: (tokens, mask), both (batch, length) -> a batch of what it takes.
    """

    tokenizer: Any
    max_length: int
    causal: bool
    make: Callable[[Array, Array], Any]


def calibration_of(
    face: JobFramework, opened: Opened, place: DataPlace | None, out: Path | None = None
) -> list[Any] | CalibrationSet | None:
    """The calibration batches that a command's options name, or None.

    Args:
        face: the framework.
        opened: the model.
        place: the data.
        out: the command's folder, beside which text that the model writes itself is kept.
    """
    if place is None:
        return None
    if place.kind == "function":
        return place.made_batches("--calib")
    if place.kind == "arrays":
        return [face.tensors(batch) for batch in place.array_batches()]
    return text_set(
        face.reader(opened), place, lambda n, length, start: written(face, opened, place, out, n, length, start)
    )


def written(
    face: JobFramework, opened: Opened, place: DataPlace, out: Path | None, n: int, length: int, start: int | None
) -> Sequence[Any]:
    """Rows that the model writes itself, kept beside the command's folder."""
    file = None if out is None else out.with_name(f"{out.name}.self.jsonl")
    rows: Sequence[Any] = face.slim.own_text(opened.model, n, length, place.seed, start=start, file=file)
    return rows


def text_set(reader: TextReader, place: DataPlace, write: Writes) -> CalibrationSet:
    """Draw a calibration set from text files and from what the model writes itself.

    Args:
        reader: how the model reads text.
        place: the sources: `samples` windows of `max_length` tokens.
        write: asks the model for text of its own.
    """
    places = (place, *place.more)
    length = min(place.max_length, reader.max_length)
    if any(p.kind == OWN for p in places) and not reader.causal:
        raise ConfigError("--calib self needs a causal language model: this one does not write text")
    form = window_form(reader.tokenizer, length, reader.causal)
    sources = []
    own: dict[str, Any] = {}
    for one, count in zip(places, shares([p.weight for p in places], place.samples)):
        if one.kind == OWN:
            rows = write(count, form.room, getattr(reader.tokenizer, "bos_token_id", None))
            own = dict(getattr(rows, "record", {}))
            sources.append(TextSource(OWN, rows, one.weight))
        else:
            sources.append(TextSource(one.reference, read_documents(Path(one.reference), one.text_key), one.weight))
    found = drawn_set(
        sources, reader.tokenizer, place.samples, length, place.seed, reader.causal, place.batch_size, reader.make
    )
    if own:
        found.record["own text"] = own
    return found


def record_of(batches: Any) -> dict[str, Any] | None:
    """What a calibration set says of itself; None of batches that say nothing."""
    record: dict[str, Any] | None = getattr(batches, "record", None)
    return record
