"""What stands in a folder where a long job is at work, or was stopped: how far, who holds it, what to do next."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.joblog import read_log
from slimkit.core.jobs import folders
from slimkit.core.locks import BLOCKS, SHARDS, holder, lock_file

# What a finished folder holds.
_FINISHED = ("sparse_report.json", "prune_report.json", "merge_report.json", "config.json", "adapter_config.json")
_NEXT = "the command that began it, once more"


def status(out: Path) -> dict[str, Any]:
    """How far the job in a folder is.

    Args:
        out: the folder that a command or function is writing to, or was.

    Returns:
        Plain JSON values: "job" (what kind), "state" ("running", "stopped" or "finished"), "holder" (pid and host of
        who runs it, None otherwise), "go_on" (the command that goes on with it; None where it is not known), "folder"
        (where that was given), "why" (what stopped it, where known), "updated" (seconds since 1970), "seconds_left",
        and "done" with the units of the job: blocks and layers, shards, stages, or updates.

    Raises:
        ConfigError: there is no such folder, or no job.

    Example:
        >>> status(Path("/no such folder"))
        Traceback (most recent call last):
        ...
        slimkit.core.errors.ConfigError: no folder '/no such folder'
    """
    if not out.is_dir():
        raise ConfigError(f"no folder {str(out)!r}")
    for base in (out / folders.FORCED, out):
        if (base / BLOCKS / "job.json").exists() or (base / BLOCKS / ".lock").exists():
            return _blocks(base, base / BLOCKS)
        if (base / SHARDS / "job.json").exists():
            return _shards(base, base / SHARDS)
    if (out / folders.STATE).is_dir():
        return _training(out)
    if (out / "run.json").exists():
        return _run(out)
    if any((out / name).exists() for name in _FINISHED):
        return {**_found("a finished result", out, None, []), "state": "finished"}
    raise ConfigError(f"no job has left a trace in {str(out)!r}")


def _begun(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last time that somebody began the job, or went on with it."""
    return next((event for event in reversed(log) if event["event"] == "begun"), {})


def _found(job: str, out: Path, lock: Path | None, log: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told of every job."""
    held = holder(lock) if lock is not None else None
    begun = _begun(log)
    if held is not None:
        held = {"pid": held.get("pid") or begun.get("pid"), "host": begun.get("host")}
    last = log[-1] if log else {}
    steps = [event for event in log if "seconds_left" in event]
    left = None
    if held is not None and steps:
        left = max(0.0, steps[-1]["seconds_left"] - (time.time() - steps[-1]["time"]))
    return {
        "job": begun.get("job", job),
        "out": str(out),
        "state": "running" if held is not None else "stopped",
        "holder": held,
        "processes": begun.get("processes", 1),
        "why": last.get("why") if held is None else None,
        "updated": last.get("time"),
        "seconds_left": None if left is None else round(left, 1),
        "go_on": begun.get("command"),
        "folder": begun.get("folder"),
        "done": {},
    }


def _blocks(base: Path, state: Path) -> dict[str, Any]:
    log = read_log(state)
    found = _found("sparsify", base, state / ".lock", log)
    begun = _begun(log)
    layers = [event for event in log if event["event"] == "layer"]
    found["done"] = {"blocks": [len(list(state.glob("block-*.json"))), begun.get("blocks")]}
    if layers:
        found["done"]["layers"] = [layers[-1]["done"], layers[-1]["total"]]
        found["at"] = layers[-1]["layer"]
        found["rows"] = layers[-1].get("rows")
    if (base / folders.SPARSE_REPORT).exists() and found["holder"] is None:
        found["state"] = "finished"
    return found


def _shards(base: Path, state: Path) -> dict[str, Any]:
    log = read_log(state)
    found = _found("a folder shard by shard", base, state / ".lock", log)
    begun = _begun(log)
    found["done"] = {"shards": [len(list((state / "finished").glob("*.safetensors"))), begun.get("shards")]}
    if found["holder"] is None and (base / "config.json").exists():
        found["state"] = "finished"
    return found


def _training(out: Path) -> dict[str, Any]:
    found = _found("training", out, lock_file(out), read_log(out / folders.STATE))
    last = out / folders.STATE / "last"
    progress = last / "trainer.json"
    if progress.exists():
        told = files.read_json(progress)
        found["done"] = {"updates": [told.get("global_step"), None]}
        found["updated"] = progress.stat().st_mtime
    return found


def _run(out: Path) -> dict[str, Any]:
    told = files.read_json(out / "run.json", "run.json")
    recipe = told.get("recipe", {}) if isinstance(told, dict) else {}
    found = _found(f"the recipe {recipe.get('name')!r}", out, out / ".lock", read_log(out / "stages"))
    # The first folder holds the model as it was loaded.
    finished = [file for file in (out / "stages").glob("[0-9]*/stage.json") if not file.parent.name.startswith("00-")]
    done, total = len(finished), len(recipe.get("stages", ()))
    found["done"] = {"stages": [done, total]}
    if found["go_on"] is None:  # begun by an earlier version: the record of a run is a recipe as well
        found["go_on"] = shlex.join(["slimkit", "run", str(out / "run.json"), "--output", str(out)])
    if done == total and found["holder"] is None:
        found["state"] = "finished"
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person.

    Args:
        found: what `status` returned.
    """
    said = [f"{found['job']} in {found['out']}: {found['state']}"]
    for unit, (done, total) in found["done"].items():
        said.append(f"  {unit}: {done} of {total if total is not None else '?'}")
    if found.get("at"):
        rows = f", from {found['rows']:,} rows" if found.get("rows") else ""
        said.append(f"  last layer: {found['at']}{rows}")
    if found["seconds_left"] is not None:
        from slimkit.core.jobs.bar import duration

        said.append(f"  about {duration(found['seconds_left'])} left")
    if found["updated"] is not None:
        said.append(f"  last sign of life: {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found['updated']))}")
    if found["holder"] is not None:
        many = f", the first of {found['processes']} processes" if found["processes"] > 1 else ""
        said.append(f"  held by process {found['holder']['pid']} on {found['holder']['host'] or 'this machine'}{many}")
    if found["why"]:
        said.append(f"  stopped by: {found['why']}")
    if found["state"] == "stopped":
        where = f" (in {found['folder']})" if found["folder"] else ""
        said.append(f"  go on with: {found['go_on'] or _NEXT}{where}")
    return said
