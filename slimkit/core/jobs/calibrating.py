"""Calibration data as the commands read it: text by a model's tokenizer, arrays, functions; and its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.core.calibration import OWN
from slimkit.core.calibration.documents import TextSource
from slimkit.core.calibration.drawing import shares
from slimkit.core.calibration.reading import TextReader
from slimkit.core.calibration.record import record_of
from slimkit.core.calibration.sets import CalibrationSet, drawn_set, window_form
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.sources import DataPlace, read_documents

if TYPE_CHECKING:
    from slimkit.core.jobs.framework import JobFramework, Opened

# f(rows, tokens a row, start token) -> rows of tokens that the dense model wrote
Writes = Callable[[int, int, int | None], Sequence[Any]]


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


def weighted(
    references: Sequence[str] | None,
    text_key: str,
    samples: int,
    max_length: int,
    batch_size: int,
    seed: int,
    option: str = "--calib",
) -> DataPlace | None:
    """The data that --calib names, once or several times, FILE=WEIGHT; None where none was given.

    Raises:
        ConfigError: no such data, a weight that is none, or several sources of which one is no text.
    """
    found = []
    for reference in references or ():
        name, sign, share = reference.rpartition("=")
        text, weight = reference, 1.0
        if sign and not Path(reference).exists():
            text = name
            try:
                weight = float(share)
            except ValueError:
                weight = 0.0
            if not 0 < weight < float("inf"):
                raise ConfigError(f"{option} FILE=WEIGHT: the weight must be a number above 0. Received: {reference!r}")
        place = DataPlace(text, text_key, samples, max_length, batch_size, weight, seed=seed, option=option)
        _ = place.kind  # refused now, and not after a model was loaded
        found.append(place)
    if len(found) > 1 and any(p.kind not in ("text", OWN) for p in found):
        raise ConfigError(f"{option} takes several sources only of text: arrays and functions stand alone")
    return replace(found[0], more=tuple(found[1:])) if found else None


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
            own = dict(record_of(rows) or {})
            sources.append(TextSource(OWN, rows, one.weight))
        else:
            sources.append(TextSource(one.reference, read_documents(Path(one.reference), one.text_key), one.weight))
    found = drawn_set(
        sources, reader.tokenizer, place.samples, length, place.seed, reader.causal, place.batch_size, reader.make
    )
    if own:
        found.record["own text"] = own
    return found
