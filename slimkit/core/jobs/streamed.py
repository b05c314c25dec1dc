"""Commands on folders larger than memory, whose results are written shard by shard and go on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs import claim
from slimkit.core.jobs.framework import JobFramework
from slimkit.core.jobs.sources import ModelPlace
from slimkit.core.locks import SHARDS
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
