"""What a run keeps of itself: the record of a finished stage, where it took place, and whether it is the same run."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.files import read_json
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.run.recipe import parse_recipe


@dataclass
class StageRecord:
    """What stage.json holds: how a finished stage went.

    Args:
        name: the stage's folder.
        kind: its kind in the recipe, "load" for the first.
        options: its options in the recipe.
        seed: the seed it began with.
        seconds: how long it took.
        facts: what it said about itself.
        curves: name -> values over the steps or epochs.
        measurement: what the model weighed afterwards.
        metrics: the recipe's metrics afterwards.
        digest: SHA-256 over the model's weights afterwards.
        files: file -> bytes, in the stage's folder.
        samples: what the recipe's function of that name gave: prompt -> the model's answer.
    """

    name: str
    kind: str
    options: dict[str, Any]
    seed: int
    seconds: float
    facts: dict[str, Any]
    curves: dict[str, list[float]]
    measurement: Measurement
    metrics: dict[str, float]
    digest: str
    files: dict[str, int]
    samples: dict[str, str] = field(default_factory=dict)


def read_record(file: Path) -> dict[str, Any]:
    """A finished stage's record; FileFormatError names what is missing or of another kind."""
    from pydantic import TypeAdapter, ValidationError

    record = read_json(file, "stage record")
    try:
        TypeAdapter(StageRecord).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{file} is damaged: {place}: {first['msg']}") from None
    found: dict[str, Any] = record
    return found


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """Where a run took place: Python, platform, processor count, and the versions of what it used."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "versions": dict(versions),
    }


def of_today(recipe: Any) -> Any:
    """A recipe that an earlier version kept, with the options that came since at their defaults."""
    try:
        return parse_recipe(recipe).model_dump(mode="json")
    except (ConfigError, TypeError, ValueError):  # an option that went, or a file that is no recipe: told below
        return recipe


def first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list):
        for at, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return first_difference(a, b, f"{path}[{at}]")
    return path or "recipe"
