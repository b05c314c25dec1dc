"""From options to what the commands work on: the model, the data, and the wing that does it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.core.errors import UnsupportedError

if TYPE_CHECKING:
    from slimkit.core.jobs.data import DataPlace, ModelPlace

# framework -> the module and class of a wing's side of the commands
_WINGS = {"torch": ("slimkit.jobs", "TorchJobs"), "mindspore": ("slimkit_ms.jobs", "MindSporeJobs")}


def wing(framework: str, command: str) -> Any:
    """The method of a framework that does a command.

    Raises:
        ArgumentError: an unknown framework.
        MissingFrameworkError: it is not installed.
        UnsupportedError: the framework does not offer the command.
    """
    from slimkit.core import check
    from slimkit.core.lazy import require

    require(check.choice(framework.lower(), _WINGS, "--framework"))
    module, name = _WINGS[framework.lower()]
    jobs = getattr(importlib.import_module(module), name)()
    if not hasattr(jobs, command):
        raise UnsupportedError(
            f"`slimkit {command}` is not offered for {framework}; `slimkit run` does it in a recipe "
            f"(framework: {framework})"
        )
    return getattr(jobs, command)


def model(path: Path | None, factory: str | None, arguments: list[str] | None) -> ModelPlace:
    """The model that --model, --factory and --arg name."""
    from slimkit.core.jobs.data import ModelPlace, settings

    return ModelPlace(path, factory, settings(arguments or [], "--arg"))


def data(reference: str | None, text_key: str, samples: int, max_length: int, batch_size: int) -> DataPlace | None:
    """The data that an option names; None where none was given."""
    from slimkit.core.jobs.data import DataPlace

    if reference is None:
        return None
    place = DataPlace(reference, text_key, samples, max_length, batch_size)
    _ = place.kind  # refused now, and not after a model was loaded
    return place


def say_where(place: ModelPlace) -> str:
    """How lines for people call the model."""
    return str(place.model) if place.model is not None else str(place.factory)
