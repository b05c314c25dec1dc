"""The job around a walk over a folder's blocks: it is claimed, begun or gone on with, logged, and committed whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimkit.core import check, files, traffic
from slimkit.core.checkpoint.openweights import read_index
from slimkit.core.checkpoint.stepwise import identity, unchanged
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.joblog import JobLog
from slimkit.core.jobs.folders import WEIGHTS
from slimkit.core.locks import BLOCKS as STATE
from slimkit.core.locks import locked, same_job, tidy
from slimkit.core.log import logger
from slimkit.core.showing import Report
from slimkit.core.sparse.compress import compress
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.processes import first
from slimkit.core.sparse.remaining import Progress

REPORT = "sparse_report.json"


class FolderHost(SparseFramework, Protocol):
    """A model whose blocks come from files, and go back to files."""

    @property
    def n_blocks(self) -> int:
        """How many blocks there are, once `layers` has looked."""

    @property
    def device(self) -> str:
        """Where blocks compute."""


def sparsify_folder(
    host: FolderHost,
    cfg: SparseConfig,
    data: Sequence[Any],
    target: Path,
    weights: Sequence[Path],
    job: Mapping[str, Any],
    copy: Callable[[Path], None],
    rewrite: Callable[[Path, Path], None],
    on_progress: Callable[[Progress], None] | None,
) -> Report:
    """Walk over a model's blocks, by one process or by all of a group, and write the result.

    Args:
        host: the model.
        cfg: what to do.
        data: batches.
        target: where the result goes, absent, empty or holding an unfinished run of the same job.
        weights: the files that are read, each with a name of its own.
        job: what tells this job from another, beside the configuration and the files.
        copy: copies what is no weights into a folder.
        rewrite: writes one of the files, with the new weights, to a place.
        on_progress: called after every layer, in process 0.

    Returns:
        The report, with the "bytes" that this call's processes read and wrote (see `traffic.Traffic.facts`).

    Raises:
        UnsupportedError: processes were given different things, or `target` was begun with others.
        ConfigError: another run is at work in `target`.
    """
    job = {"config": cfg.to_dict(), "source": identity(weights), **job}
    told = host.gather(job)
    if any(other != told[0] for other in told):
        raise UnsupportedError("all processes must be given the same model, data, configuration and threads.")
    state, finished = target / STATE, target / STATE / "finished"

    def begin() -> Any:
        # A run of an earlier version does not say what its model's configuration was.
        known = {"model": job["model"]} if "model" in job else {}
        same_job(state, job, {"config": SparseConfig().to_dict(), "compute": "None", "device": "cpu", **known})
        files.settle(target)
        for part in target.rglob(".*.part"):  # a killed writer cannot clean up after itself
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if not (target / REPORT).exists():
            return None
        tidy(state)  # the kill may have come while tidying
        return files.read_json(target / REPORT)

    def prepare() -> None:
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        copy(finished)
        files.write_json(finished / REPORT, report)

    def commit() -> None:
        look()
        files.commit(finished, target)
        tidy(state)

    with _claimed(host, target), traffic.counted(weights) as count, unchanged(weights) as look:
        report = first(host, begin)
        if report is None:
            report = _walk(host, cfg, data, state, on_progress if host.rank() == 0 else _unseen)
            first(host, prepare)
            for file in weights[host.rank() :: host.processes()]:
                rewrite(file, finished / file.name)
            host.gather(None)  # all are written
            first(host, commit)
        moved = traffic.added(host.gather(count.facts()))
        traffic.say("sparsify", moved)
    return Report("sparsity", {**report, "bytes": moved})


def _unseen(_step: Progress) -> None:
    """The progress of a process that does not speak."""


@contextlib.contextmanager
def _claimed(host: FolderHost, target: Path) -> Iterator[None]:
    """Process 0 holds the folder's lock, and it alone speaks, while the context is open."""
    quiet = logger.disabled
    with contextlib.ExitStack() as held:
        try:
            logger.disabled = quiet or host.rank() > 0
            first(host, lambda: _claim(held, target))
            yield
        finally:
            logger.disabled = quiet


def _claim(held: contextlib.ExitStack, target: Path) -> None:
    """Make sure that the folder is free, and lock it."""
    state = target / STATE
    # A run killed in its first moments leaves its state folder and nothing else.
    if target.exists() and any(f.name != STATE for f in target.iterdir()) and not (state / "job.json").exists():
        check.wrong_value("dst", "absent, empty, or an unfinished run", str(target))
    held.enter_context(locked(state, "dst", inside=True))


def _walk(
    host: FolderHost,
    cfg: SparseConfig,
    data: Sequence[Any],
    state: Path,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """The report of a walk that begins, or goes on."""
    try:
        report, _ = compress(host, cfg, data, on_progress, _logging(host, state, cfg, data))
    except BaseException as error:
        if host.rank() == 0:
            JobLog(state).stopped(error)
        raise
    for row in report["layers"].values():
        row.pop("seconds", None)  # the same job writes the same bytes
    return {k: v for k, v in report.items() if k != "seconds"}


def _logging(
    host: FolderHost, state: Path, cfg: SparseConfig, data: Sequence[Any]
) -> Callable[[Progress, dict[str, Any]], None] | None:
    """Begin the job's log, in process 0; what writes a line for each layer."""
    if host.rank() > 0:
        return None
    log = JobLog(state)
    facts = {"batches": len(data), "blocks": host.n_blocks, "processes": host.processes()}
    log.begun("sparsify", method=cfg.method, device=host.device, **facts)

    def layer(step: Progress, row: dict[str, Any]) -> None:
        where = {"layer": step.layer, "done": step.done, "total": step.total, "rows": row.get("rows")}
        log.note("layer", **where, seconds=round(step.seconds, 3), seconds_left=round(step.seconds_left, 1))

    return layer


def copy_others(source: Path, target: Path, weights: Sequence[Path]) -> None:
    """Copy what is no weights: configuration, tokenizer, the index of what was read, and the like."""
    read = {file.name for file in weights}
    for file in sorted(source.iterdir()):
        weighs = file.suffix in WEIGHTS or (file.name.endswith(".index.json") and not _indexes(file, read))
        if file not in weights and file.is_file() and not weighs:
            with open(file, "rb") as old, files.atomic_file(target / file.name) as new:
                shutil.copyfileobj(old, new)


def _indexes(file: Path, read: Collection[str]) -> bool:
    """Whether an index names no file but those that were read, which the result has too."""
    try:
        return set(read_index(file).values()) <= set(read)
    except FileFormatError:
        return False
