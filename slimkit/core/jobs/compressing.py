"""The command `compress`: what a fully fine-tuned model has learned, written as a small delta on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.calibration.record import record_of, write_record
from slimkit.core.jobs import cards, commands, early, folders, work
from slimkit.core.jobs.calibrating import calibration_of
from slimkit.core.jobs.command_options import CompressOptions
from slimkit.core.jobs.framework import JobFramework
from slimkit.core.jobs.sources import DataPlace, ModelPlace


def compress(
    face: JobFramework,
    place: ModelPlace,
    tuned: ModelPlace,
    out: Path | None,
    options: CompressOptions,
    *,
    calib: DataPlace | None,
    seed: int,
) -> dict[str, Any]:
    """Make a small delta of a fine-tuned model; with `out` None say how small and how near it would be.

    Args:
        face: the framework.
        place: the base.
        tuned: the same network after fine-tuning.
        out: the bundle's folder.
        options: of the job.
        calib: what both models are run on, without labels.
        seed: of the random range by which large weights are factored.

    Returns:
        kind, layers (path -> its bytes and its relative error), notes, and with `out` delta_bytes.

    Raises:
        PlanError: the two are not of one shape.
    """
    early.check(place, options, calib=calib)
    opened, learned = face.open(place), face.open(tuned)
    batches = commands.proved(face, opened, calibration_of(face, opened, calib, out), calib)
    report = face.slim.compress_delta(
        opened.model, learned.model, **options.arguments(), seed=seed,
        calibration=None if batches is None else list(batches),
    )  # fmt: skip
    told = ("rank", "bytes", "error")
    facts: dict[str, Any] = {
        "kind": options.kind,
        "parameters": work.count(face, learned.model),
        "layers": {path: {key: row[key] for key in told} for path, row in report.layers.items()},
        "notes": list(report.notes),
    }
    if out is None:
        return facts
    with files.atomic_directory(out) as folder:
        face.slim.save_delta(opened.model, folder)
        facts["delta_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        folders.write_report(folder, "compress", facts)
        more = {"--tuned": tuned.model, **cards.data_flags(calib, seed=seed)}
        command = cards.command_line("compress", place, options, more)
        rows = {"layers": f"{len(facts['layers'])}", "size": report.notes[0]}
        cards.write_card(folder, "delta", opened, command, rows, "delta")
        write_record(folder, "compress", record_of(batches), place.model)
    return facts
