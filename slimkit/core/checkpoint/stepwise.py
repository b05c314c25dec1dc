"""A checkpoint folder written shard by shard: nothing is half written, and a run that was killed goes on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.checkpoint.shards import Place
from slimkit.core.checkpoint.weightfile import Entry, stream_safetensors
from slimkit.core.errors import UnsupportedError
from slimkit.core.locks import SHARDS, locked, same_job
from slimkit.core.log import progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECES, _PIECE_BYTES = 64, 4096


@dataclass(frozen=True)
class Shard:
    """One file of weights to be written: its name, and what it will hold, in order."""

    name: str
    entries: Mapping[str, Entry]


# A shard in, its tensors out in order: (name, stored array or Piece), each written and forgotten.
Make = Callable[[Shard], Iterable[tuple[str, Any]]]


def write_folder(
    target: Path,
    job: Mapping[str, Any],
    shards: Sequence[Shard],
    make: Make,
    rest: Callable[[Path], dict[str, Any]],
    report_name: str,
) -> dict[str, Any]:
    """Write a folder of weights and what belongs to them; the same call after a kill goes on to the same bytes.

    Whole shards wait in ``target/.slimkit-shards/finished``; when all are there, one rename puts everything in place.

    Args:
        target: the folder, absent, empty, or holding an unfinished run of the same job.
        job: what goes in, as plain JSON values.
        shards: what to write.
        make: gives a shard's tensors.
        rest: writes what belongs to the weights (configuration, tokenizer) into the folder of finished files, and
            returns the report, which must be the same in every run.
        report_name: the report's file.

    Returns:
        The report.

    Raises:
        ArgumentError: `target` holds something else.
        UnsupportedError: it was begun with other inputs.
        ConfigError: another process is at work there.
    """
    state = target / SHARDS
    # A run killed in its first moments leaves its state folder and nothing else.
    if target.exists() and any(f.name != SHARDS for f in target.iterdir()) and not (state / "job.json").exists():
        check.wrong_value("dst", "absent, empty, or an unfinished run", str(target))
    with locked(state, "dst", inside=True):
        same_job(state, job)
        files.settle(target)
        for part in state.rglob(".*.part"):  # a killed writer cannot clean up after itself
            part.unlink()
        if (target / report_name).exists():
            tidy(state)  # the kill may have come while tidying
            report: dict[str, Any] = files.read_json(target / report_name)
            return report
        finished = state / "finished"
        finished.mkdir(exist_ok=True)
        for shard in progress(shards, "shards"):
            if not (finished / shard.name).exists():
                stream_safetensors(finished / shard.name, shard.entries, make(shard), {"format": "pt"})
        report = rest(finished)
        write_index(finished, shards)
        files.write_json(finished / report_name, report)
        files.commit(finished, target)
        tidy(state)
    return report


def tidy(state: Path) -> None:
    """Take away what a finished run no longer needs; what says which job it was stays."""
    for leftover in state.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name not in ("job.json", ".lock"):
            leftover.unlink()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards, as transformers writes it; nothing for one file of the plain name."""
    if [shard.name for shard in shards] == [SINGLE]:
        return
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    homes = {name: shard.name for shard in shards for name in shard.entries}
    total = {
        "total_parameters": sum(e.size for e in entries.values()),
        "total_size": sum(e.nbytes for e in entries.values()),
    }
    files.write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(homes.items()))})


def identity(places: Mapping[str, Place]) -> dict[str, str]:
    """What tells the weight files of a folder from others: name -> digest.

    Sizes, times of change and pieces of the contents go in, not every byte: what runs as fast as a copy cannot read
    its source twice.
    """
    found = {}
    for file in sorted({place.file for place in places.values()}):
        about = file.stat()
        digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
        with open(file, "rb") as handle:
            for number in range(_PIECES):
                handle.seek(max(0, about.st_size - _PIECE_BYTES) * number // (_PIECES - 1))
                digest.update(handle.read(_PIECE_BYTES))
        found[file.name] = digest.hexdigest()
    return found


def layout(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """File -> its tensors, in the order in which the file holds them."""
    found: dict[str, list[str]] = {}
    for name, place in sorted(places.items(), key=lambda item: (item[1].file.name, item[1].start, item[0])):
        found.setdefault(place.file.name, []).append(name)
    return found


def another_folder(source: Path, target: Path) -> None:
    """Refuse to write over what is read."""
    if source.resolve() == target.resolve():
        check.wrong_value("dst", "another directory than src", str(target))


def copied(name: str, place: Place) -> Entry:
    """The entry of a tensor that is copied as it is."""
    from slimkit.core.checkpoint.weightfile import STORED

    if place.dtype not in STORED:
        raise UnsupportedError(f"tensor {name!r} has the unknown element type {place.dtype!r}")
    return Entry(place.dtype, place.shape)
