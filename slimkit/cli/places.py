"""From options to what the commands work on: the model, the data, and the framework that does it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from slimkit.cli.options import Network

if TYPE_CHECKING:
    from slimkit.core.jobs.command_options import StudentOptions
    from slimkit.core.jobs.framework import JobFramework
    from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace

# framework -> the module and class of its side of the jobs
_JOBS = {"torch": ("slimkit.jobs", "TorchJobs"), "mindspore": ("slimkit_ms.jobs", "MindSporeJobs")}


def framework(network: Network) -> JobFramework:
    """The side of the jobs that --framework names, computing on --device.

    Raises:
        ArgumentError: an unknown framework.
        MissingFrameworkError: it is not installed.
        ConfigError: this machine has no such device.
    """
    from slimkit.core import check
    from slimkit.core.lazy import require

    name = network.framework.lower()
    require(check.choice(name, _JOBS, "--framework"))
    module, kind = _JOBS[name]
    face: JobFramework = getattr(importlib.import_module(module), kind)(network.device)
    return face


def model(network: Network) -> ModelPlace:
    """The model that --model, --factory and --arg name."""
    from slimkit.core.jobs.sources import ModelPlace, settings

    return ModelPlace(network.model, network.factory, settings(network.arguments or [], "--arg"))


def student(
    network: Network,
    cut: StudentOptions,
    weights: Path | None,
    factory: str | None,
    arguments: list[str] | None,
) -> StudentPlace:
    """The student that a command's options name."""
    from slimkit.core.errors import ConfigError
    from slimkit.core.jobs.sources import ModelPlace, StudentPlace, settings

    place = None
    if arguments and factory is None and network.factory is None:
        raise ConfigError("--student-arg is for the function of --student-factory or --factory")
    if weights is not None or factory is not None or arguments:
        named = settings(arguments or [], "--student-arg")
        place = ModelPlace(weights, factory or network.factory, named, option="--student")
    return StudentPlace(cut.sizes(), cut.selection, cut.blocks(), cut.teacher, place)


def data(reference: str | None, text_key: str, samples: int, max_length: int, batch_size: int) -> DataPlace | None:
    """The data that an option names; None where none was given."""
    from slimkit.core.jobs.sources import DataPlace

    if reference is None:
        return None
    place = DataPlace(reference, text_key, samples, max_length, batch_size)
    _ = place.kind  # refused now, and not after a model was loaded
    return place


def calibration(
    references: list[str] | None, text_key: str, samples: int, max_length: int, batch_size: int, seed: int
) -> DataPlace | None:
    """The data that --calib names, once or several times; None where none was given."""
    from slimkit.core.jobs.calibrating import weighted

    return weighted(references, text_key, samples, max_length, batch_size, seed)


def say_where(place: ModelPlace) -> str:
    """How lines for people call the model."""
    return str(place.model) if place.model is not None else str(place.factory)
