"""The record of what a folder's model was calibrated on, step by step, and what is looked for in held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from slimkit.core import files
from slimkit.core.calibration import RECORD
from slimkit.core.calibration.apart import refuse_seen
from slimkit.core.errors import ArgumentTypeError, FileFormatError

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "slimkit-calibration", 1
_NEEDED = ("windows", "length", "tokens", "sha256", "stretches", "sources")


@runtime_checkable
class Recorded(Protocol):
    """Calibration data that says where it comes from: `CalibrationSet`, `OwnText`."""

    record: dict[str, Any]


def record_of(batches: Any) -> dict[str, Any] | None:
    """What calibration data says of itself; None of data that says nothing."""
    return batches.record if isinstance(batches, Recorded) else None


def read_record(folder: Path) -> list[dict[str, Any]]:
    """What the model of a folder was calibrated on, oldest step first; nothing where it says nothing.

    Raises:
        FileFormatError: the record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return []
    found = files.read_json(file, "calibration record")
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise FileFormatError(f"{file} is not a slimkit calibration record of version {VERSION}")
    steps = found.get("steps")
    if not isinstance(steps, list) or not all(isinstance(s, dict) and set(_NEEDED) <= set(s) for s in steps):
        raise FileFormatError(f"{file} is a calibration record without what it must hold: {', '.join(_NEEDED)}")
    return steps


def write_record(folder: Path, command: str, record: Mapping[str, Any] | None, earlier: Path | None = None) -> None:
    """Write beside a model what it was calibrated on.

    Args:
        folder: of the model.
        command: what calibrated it.
        record: of the calibration set; None where the data said nothing of itself.
        earlier: the folder that the model came from, whose record goes on.
    """
    steps = [] if earlier is None or not earlier.is_dir() else read_record(earlier)
    if record is not None:
        steps = [*steps, {"command": command, **record}]
    if steps:
        files.write_json(folder / RECORD, {"format": FORMAT, "version": VERSION, "steps": steps})


def records_of(calibrated: Any) -> list[Mapping[str, Any]]:
    """The records in what a user gives: calibration sets, their records, or several of them.

    Raises:
        ArgumentTypeError: something else.
    """
    if calibrated is None:
        return []
    record = calibrated.record if isinstance(calibrated, Recorded) else calibrated
    if isinstance(record, Mapping) and "stretches" in record:
        return [record]
    if isinstance(calibrated, (list, tuple)):
        return [one for part in calibrated for one in records_of(part)]
    raise ArgumentTypeError(
        f"calibrated must be a calibration set, its record, or a list of them. Received: {type(calibrated).__name__}"
    )


def keep_apart(records: Sequence[tuple[str, Mapping[str, Any]]], documents: Sequence[Array]) -> list[dict[str, Any]]:
    """Refuse held-out documents that were calibrated on; returns what is stored with a result.

    Args:
        records: (whose, record of a calibration set).
        documents: tokens of each held-out document.

    Raises:
        ArgumentError: windows of a set stand in the documents.
    """
    told = []
    for whose, record in records:
        found = refuse_seen(record, documents, whose)
        told.append(
            {"model": whose, "seen": found, **{k: record[k] for k in ("sha256", "windows", "length", "tokens")}}
        )
    return told
