"""Commands on folders larger than memory, whose results are written shard by shard and go on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.calibration.record import record_of, write_record
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs import cards, claim, commands, early, folders, pruning, work
from slimkit.core.jobs.framework import JobFramework
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace
from slimkit.core.locks import SHARDS
from slimkit.core.log import logger
from slimkit.core.public import homes


def can_stream(place: ModelPlace) -> bool:
    """Whether a model is a folder that can be read tensor by tensor."""
    folder = place.model
    return (
        place.factory is None
        and folder is not None
        and (folder / "config.json").is_file()
        and any(folder.glob("*.safetensors"))
    )


def merge(face: JobFramework, place: ModelPlace, delta: Path | None, out: Path | None) -> dict[str, Any]:
    """Merge a delta into a folder; with `out` None only see that this can be done.

    Args:
        face: the framework.
        place: the base.
        delta: the delta's folder.
        out: folder of the result, claimed.

    Returns:
        The report of `merge_checkpoint`, and "format".
    """
    if delta is None:
        raise ConfigError("--format hf needs --delta: without one it would be a copy of --model")
    if not can_stream(place) or place.model is None:
        raise ConfigError("--format hf needs a --model folder with a config.json and .safetensors files")
    base, call = place.model, _call(face, "merge_checkpoint", "--format hf")
    if out is None:
        return {"format": "hf"}
    return {"format": "hf", **_written(out, lambda folder: call(base, delta, folder))}


def prefers_stream(place: ModelPlace, asked: bool | None, torch: bool) -> bool:
    """Whether a folder is to be pruned tensor by tensor: as asked, or where the model would not fit beside its copy.

    Args:
        place: the model.
        asked: --stream, --whole, or neither.
        torch: whether PyTorch does the work, which alone can.
    """
    if asked is not None or not torch or not can_stream(place) or place.model is None:
        return bool(asked)
    if (place.model / folders.PLAN).exists():
        return False
    weights, free = sum(f.stat().st_size for f in place.model.glob("*.safetensors")), free_bytes()
    if free is None or weights * _COPIES <= free:
        return False
    logger.info(
        "the model's %.1f GB and a copy do not fit the free %.1f GB: tensor by tensor", weights / 1e9, free / 1e9
    )
    return True


# Pruning in memory holds the model, what is cut of it, and the reloaded result.
_COPIES = 2


def free_bytes() -> int | None:
    """Memory that this process may still take; None where the system does not say."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass
    return min(found) if found else None


def prune(
    face: JobFramework,
    place: ModelPlace,
    out: Path | None,
    options: PruneOptions,
    *,
    calib: DataPlace | None,
    seed: int,
) -> dict[str, Any]:
    """Prune a folder tensor by tensor; with `out` None only plan it.

    Args:
        face: the framework.
        place: the model.
        out: folder of the pruned model, claimed.
        options: of the job.
        calib: calibration data.
        seed: of random importance, and of what is drawn.

    Returns:
        What `commands.prune` returns, without "reloaded".
    """
    early.check(place, options, calib=calib)
    if not can_stream(place) or place.model is None:
        raise ConfigError("--stream needs a --model folder with a config.json and .safetensors files")
    if options.budget == "latency":
        raise ConfigError(
            "--budget latency times the model in memory, and --stream leaves it on disk: give --whole, or another "
            "budget"
        )
    source = place.model
    pruner, batches = face.folder_pruner(place, source if out is None else out, calib)
    context = commands.CommandContext(face, seed, None, options, batches=batches)
    pruning.set_up(pruner, pruner.model, options, context)
    context.warn_unread(pruning.UNREAD)
    if out is None:
        before = work.count(face, pruner.model)
        after, _ = pruner.analysis(options.reserved_ratio, options.un_prune_list)
        facts = {"parameters_before": before, "parameters": after, "kept": after / before}
        return {**facts, "report": pruner.report()}
    settings = {"seed": seed, **options.model_dump(mode="json")}
    command = cards.command_line("prune", place, options, cards.data_flags(calib, seed=seed)) + " --stream"

    def write(folder: Path) -> dict[str, Any]:
        report = pruner.write(folder, options.reserved_ratio, options.un_prune_list, settings, options.defaults())
        facts = {key: report[key] for key in ("parameters_before", "parameters", "kept", "report")}
        facts["written"] = "transformers"
        kind, rows = type(pruner.model).__name__, cards.pruned_facts(facts, options)
        cards.write_card_of(folder, "pruned", source, kind, command, rows, "transformers")
        folders.write_report(folder, "prune", {"asked": options.reserved_ratio, "command": command, **facts})
        write_record(folder, "prune", record_of(batches), source)
        return facts

    return _written(out, write)


def _call(face: JobFramework, name: str, option: str) -> Callable[..., Any]:
    """The call that does the work, where the framework has it."""
    if name not in homes(face.slim.__name__):
        raise UnsupportedError(
            f"{option} reads folders of transformers, which are PyTorch's: leave --framework out, and let slimkit "
            "convert make a MindSpore model of the result"
        )
    found: Callable[..., Any] = getattr(face.slim, name)
    return found


def _written(out: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Let a folder be written; what `out` held before stays until it is whole."""
    work = claim.workplace(out, SHARDS)
    report = dict(write(work))
    claim.finish(work / SHARDS)
    if work is not out:
        files.replace(work, out)
    return report
