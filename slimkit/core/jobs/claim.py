"""The place of a command's result: claimed before any work, and given back without a trace when the work fails."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.locks import BLOCKS as BLOCK_STATE
from slimkit.core.locks import SHARDS as SHARD_STATE
from slimkit.core.locks import locked
from slimkit.core.log import logger

# What tells a folder of models, deltas or runs from any other: --force replaces no other.
_OURS = (
    "config.json", "adapter_config.json", "plan.json", "manifest.json", "run.json", "*_report.json", "*.safetensors",
    "*.ckpt", "*.bin", "*.pt", "*.manifest.json",
)  # fmt: skip


@dataclass(frozen=True)
class Unfinished:
    """What an unfinished run of a command leaves in its folder.

    Args:
        name: the entry that holds its state.
        work: globs below it of what took time: a failing command leaves it only where it has some.
        shares: whether results may lie beside it already, as a stopped move of finished files leaves them.
    """

    name: str
    work: tuple[str, ...]
    shares: bool = False

    def has_work(self, out: Path) -> bool:
        """Whether something in it is worth going on from."""
        return any(True for glob in self.work for _ in (out / self.name).glob(glob))


TRAINING = (Unfinished(folders.STATE, ("last", "teacher/*")),)
BLOCKS = (
    Unfinished(BLOCK_STATE, ("block-*.json",), shares=True),
    Unfinished(folders.FORCED, (f"{BLOCK_STATE}/block-*.json",)),
)
SHARDS = (
    Unfinished(SHARD_STATE, ("finished/*.safetensors",), shares=True),
    Unfinished(folders.FORCED, (f"{SHARD_STATE}/finished/*.safetensors",)),
)
RUN = (
    Unfinished("stages", ("*/stage.json",), shares=True),
    Unfinished("run.json", (), shares=True),
    Unfinished(".lock", ()),
)


@contextlib.contextmanager
def claimed(
    out: Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    file: bool = False,
    states: tuple[Unfinished, ...] = (),
    reads: Iterable[Path | None] = (),
    option: str = "--out",
) -> Iterator[Path | None]:
    """Hold the place of a command's result while the command works.

    Nothing of the user's is ever replaced unless `force` asks for it, and then only by a result that is whole. Where
    the command fails, what it began goes, unless hours lie in it: then the log says that it can go on.

    Args:
        out: what the user gave.
        force: replace what is there.
        dry_run: nothing will be written.
        file: whether the result is a file, and not a folder.
        states: what an unfinished run of the command leaves there; its folder is then held against a second run.
        reads: what the command reads; `force` must not replace it.
        option: how the user named the place.

    Yields:
        The absolute path; None for a dry run.

    Raises:
        ConfigError: something is there already, or another run is at work.

    Example:
        >>> with claimed(Path("/tmp/no such folder"), dry_run=True) as place:
        ...     place is None
        True
    """
    _free(out, force, file, states, reads, option)
    if dry_run:
        yield None
        return
    place = out.absolute()
    missing = [p for p in (place, *place.parents) if not p.exists()]
    before = {state.name for state in states if (place / state.name).exists()}
    try:
        with locked(place, option) if states else contextlib.nullcontext():
            try:
                yield place
            except BaseException as error:
                _give_back(place, [s for s in states if s.name not in before], isinstance(error, Exception), option)
                raise
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # something is in it, or it was never made
                folder.rmdir()
        raise


def workplace(out: Path, state: str) -> Path:
    """Where a command that can go on works: in its folder, or inside it where --force keeps what it holds so far.

    Args:
        out: the folder, claimed.
        state: the entry that holds an unfinished run's state.
    """
    filled = out.is_dir() and any(entry.name != state for entry in out.iterdir())
    stopped = (out / state / "job.json").exists()  # finished files may lie beside it
    return out / folders.FORCED if filled and not stopped else out


def finish(state: Path) -> None:
    """Take the state of a finished run away, what says which job it is at last."""
    for entry in state.iterdir() if state.is_dir() else ():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "job.json":
            entry.unlink()
    shutil.rmtree(state, ignore_errors=True)


def _free(
    out: Path, force: bool, file: bool, states: tuple[Unfinished, ...], reads: Iterable[Path | None], option: str
) -> None:
    """Refuse a place that holds something of the user's."""
    if out.is_symlink():
        raise ConfigError(f"{option} must not be a symbolic link. Received: {str(out)!r}")
    if not out.exists():
        return
    if file:
        if out.is_dir():
            raise ConfigError(f"{option} must be a file, and {str(out)!r} is a folder")
    elif not out.is_dir():
        raise ConfigError(f"{option} must be a folder, and {str(out)!r} is a file")
    else:
        files.settle(out)
        begun = {state.name for state in states}
        if any(state.shares and _begun(out / state.name) for state in states):
            return
        if not {entry.name for entry in out.iterdir()} - begun:
            return
    if not force:
        what = "a file that does not exist yet" if file else "a folder that does not exist yet or is empty"
        raise ConfigError(f"{option} must be {what}; --force replaces it. Received: {str(out)!r}")
    here = out.resolve()
    for read in reads:
        if read is not None and read.exists() and here in (read.resolve(), *read.resolve().parents):
            raise ConfigError(f"{option} holds what the command reads, {str(read)!r}: --force does not replace that")
    if not file and (here in (Path.cwd().resolve(), *Path.cwd().resolve().parents) or not _is_ours(here)):
        raise ConfigError(
            f"--force replaces a folder that holds a model, a delta or a run, and no other. {option}: {str(out)!r}"
        )


def _begun(state: Path) -> bool:
    return state.is_file() or (state.is_dir() and any(state.iterdir()))


def _is_ours(folder: Path) -> bool:
    return any(True for glob in _OURS for _ in folder.glob(glob))


def _give_back(out: Path, begun: list[Unfinished], failed: bool, option: str) -> None:
    """Take away what a command began, unless there is work in it."""
    if any(state.has_work(out) for state in begun):
        if failed:
            logger.warning("%s %s keeps what was done: the same command goes on from there", option, out)
        return
    for state in begun:
        entry = out / state.name
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
