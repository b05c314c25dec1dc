"""A checkpoint folder written shard by shard: nothing is half written, and a run that was killed goes on."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimkit.core import check, files, traffic
from slimkit.core.checkpoint.shards import Place
from slimkit.core.checkpoint.weightfile import STORED, Entry, stream_safetensors
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.joblog import JobLog
from slimkit.core.locks import SHARDS, locked, same_job, tidy
from slimkit.core.log import progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECES, _PIECE_BYTES = 64, 4096
LIMIT_BYTES = 5_000_000_000  # of one file, as transformers has it


@dataclass(frozen=True)
class Shard:
    """One file of weights to be written: its name, and what it will hold, in order."""

    name: str
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Work:
    """What is to be written, known once everything that decides it has been looked at.

    Args:
        shards: the files of weights.
        make: gives a shard's tensors in order, (name, stored array or Piece); each is written and forgotten.
        rest: writes what belongs to the weights (configuration, tokenizer) into the folder of finished files, and
            returns the report, which must be the same in every run.
    """

    shards: Sequence[Shard]
    make: Callable[[Shard], Iterable[tuple[str, Any]]]
    rest: Callable[[Path], dict[str, Any]]


def write_folder(
    target: Path,
    source: Iterable[Path],
    job: Mapping[str, Any],
    begin: Callable[[Path], Work],
    report_name: str,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a folder of weights and what belongs to them; the same call after a kill goes on to the same bytes.

    Whole shards wait in ``target/.slimkit-shards/finished``; when all are there, one rename puts everything in place.

    Args:
        target: the folder, absent, empty, or holding an unfinished run of the same job.
        source: the files of weights that are read.
        job: what goes in, as plain JSON values.
        begin: given the folder of the job's state, in which it may keep what took time; says what to write. Where it
            raises an error and kept nothing, `target` is as it was.
        report_name: the report's file.
        defaults: what parts of the job that came since a run was begun mean where nobody sets them.

    Returns:
        The report, with the "bytes" that this call read and wrote (see `traffic.Traffic.facts`), which the file lacks:
        a run that went on has read others.

    Raises:
        ArgumentError: `target` holds something else.
        UnsupportedError: it was begun with other inputs.
        ConfigError: another process is at work there.
    """
    source = list(source)
    with traffic.counted(source) as count, unchanged(source) as look:
        report = _written(target, job, begin, report_name, defaults, look)
    traffic.say(report_name.removesuffix("_report.json"), count.facts())
    return {**report, "bytes": count.facts()}


def _written(
    target: Path,
    job: Mapping[str, Any],
    begin: Callable[[Path], Work],
    report_name: str,
    defaults: Mapping[str, Any] | None,
    look: Callable[[], None],
) -> dict[str, Any]:
    state = target / SHARDS
    # A run killed in its first moments leaves its state folder and nothing else.
    if target.exists() and any(f.name != SHARDS for f in target.iterdir()) and not (state / "job.json").exists():
        check.wrong_value("dst", "absent, empty, or an unfinished run", str(target))
    missing = [p for p in (target, *target.absolute().parents) if not p.exists()]
    try:
        with locked(state, "dst", inside=True):
            same_job(state, job, defaults)
            files.settle(target)
            for part in state.rglob(".*.part"):  # a killed writer cannot clean up after itself
                part.unlink()
            if (target / report_name).exists():
                tidy(state)  # the kill may have come while tidying
                report: dict[str, Any] = files.read_json(target / report_name)
                return report
            try:
                work = begin(state)
            except Exception:
                if {entry.name for entry in state.iterdir()} <= {"job.json", ".lock"}:
                    shutil.rmtree(state)
                raise
            return _write(target, state, work, report_name, look)
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def _write(target: Path, state: Path, work: Work, report_name: str, look: Callable[[], None]) -> dict[str, Any]:
    finished = state / "finished"
    finished.mkdir(exist_ok=True)
    log = JobLog(state)
    log.begun(report_name.removesuffix("_report.json"), shards=len(work.shards))
    try:
        for shard in progress(work.shards, "shards"):
            if not (finished / shard.name).exists():
                stream_safetensors(finished / shard.name, shard.entries, work.make(shard), {"format": "pt"})
                log.note("shard", file=shard.name)
        report = work.rest(finished)
        write_index(finished, work.shards)
        files.write_json(finished / report_name, report)
        look()
    except BaseException as error:
        log.stopped(error)
        raise
    files.commit(finished, target)
    tidy(state)
    return report


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


def identity(weight_files: Iterable[Path]) -> dict[str, str]:
    """What tells weight files from others: name -> digest.

    Sizes, times of change and pieces of the contents go in, not every byte: what runs as fast as a copy cannot read
    its source twice.
    """
    found = {}
    for file in sorted(set(weight_files)):
        about = file.stat()
        digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
        with open(file, "rb") as handle:
            for number in range(_PIECES):
                handle.seek(max(0, about.st_size - _PIECE_BYTES) * number // (_PIECES - 1))
                digest.update(handle.read(_PIECE_BYTES))
        found[file.name] = digest.hexdigest()
    return found


@contextlib.contextmanager
def unchanged(source: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Gives what refuses to go on, with FileFormatError, where one of these files is no longer as it was."""

    def stamps() -> dict[Path, tuple[int, int]]:
        return {file: (about.st_size, about.st_mtime_ns) for file in files_read for about in [file.stat()]}

    files_read = sorted(set(source))
    before = stamps()

    def look() -> None:
        now = stamps()
        changed = next((file for file in files_read if now[file] != before[file]), None)
        if changed is not None:
            raise FileFormatError(
                f"{changed} was changed while it was read, and what is finished is made of both: begin again in an "
                "empty folder"
            )

    yield look


def layout(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """File -> its tensors, in the order in which the file holds them."""
    found: dict[str, list[str]] = {}
    for name, place in sorted(places.items(), key=lambda item: (item[1].file.name, item[1].start, item[0])):
        found.setdefault(place.file.name, []).append(name)
    return found


def shared_out(entries: Mapping[str, Entry], limit: int = LIMIT_BYTES) -> list[Shard]:
    """Tensors in new files of at most so many bytes (or one tensor), named as transformers names them.

    Example:
        >>> [s.name for s in shared_out({"a": Entry("F32", (2,)), "b": Entry("F32", (2,))}, 8)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    parts: list[dict[str, Entry]] = [{}]
    held = 0
    for name, entry in entries.items():
        if parts[-1] and held + entry.nbytes > limit:
            parts.append({})
            held = 0
        parts[-1][name] = entry
        held += entry.nbytes
    if len(parts) == 1:
        return [Shard(SINGLE, parts[0])]
    return [Shard(f"model-{k:05d}-of-{len(parts):05d}.safetensors", part) for k, part in enumerate(parts, 1)]


def another_folder(source: Path, target: Path) -> None:
    """Refuse to write over what is read."""
    if source.resolve() == target.resolve():
        check.wrong_value("dst", "another directory than src", str(target))


def copied(name: str, place: Place) -> Entry:
    """The entry of a tensor that is copied as it is."""
    if place.dtype not in STORED:
        raise UnsupportedError(f"tensor {name!r} has the unknown element type {place.dtype!r}")
    return Entry(place.dtype, place.shape)
