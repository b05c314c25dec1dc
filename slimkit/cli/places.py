"""From options to what the commands work on: the model, the data, and the wing that does it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slimkit.cli.options import Network
from slimkit.core.errors import ConfigError

if TYPE_CHECKING:
    from slimkit.core.jobs.data import DataPlace, ModelPlace
    from slimkit.core.jobs.wing import Jobs

# framework -> the module and class of a wing's side of the commands
_WINGS = {"torch": ("slimkit.jobs", "TorchJobs"), "mindspore": ("slimkit_ms.jobs", "MindSporeJobs")}


def wing(framework: str, device: str | None = None) -> Jobs:
    """A framework's side of the commands, computing on a device.

    Raises:
        ArgumentError: an unknown framework.
        MissingFrameworkError: it is not installed.
        ConfigError: this machine has no such device.
    """
    from slimkit.core import check
    from slimkit.core.lazy import require

    require(check.choice(framework.lower(), _WINGS, "--framework"))
    module, name = _WINGS[framework.lower()]
    jobs: Jobs = getattr(importlib.import_module(module), name)(device)
    return jobs


def model(network: Network) -> ModelPlace:
    """The model that --model, --factory and --arg name."""
    from slimkit.core.jobs.data import ModelPlace, settings

    return ModelPlace(network.model, network.factory, settings(network.arguments or [], "--arg"))


def student(
    network: Network, weights: Path | None, factory: str | None, arguments: list[str] | None
) -> ModelPlace | None:
    """The student that --student, --student-factory and --student-arg name; None where none of them was given."""
    from slimkit.core.jobs.data import ModelPlace, settings

    if weights is None and factory is None and not arguments:
        return None
    return ModelPlace(weights, factory or network.factory, settings(arguments or [], "--student-arg"))


def matches(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of layers that --match names, the teacher's first."""
    pairs = []
    for text in texts:
        theirs, _, mine = text.partition("=")
        if not theirs or not mine:
            raise ConfigError(f"--match must be TEACHER=STUDENT, two layers by their paths. Received: {text!r}")
        pairs.append((theirs, mine))
    return tuple(pairs)


def data(reference: str | None, text_key: str, samples: int, max_length: int, batch_size: int) -> DataPlace | None:
    """The data that an option names; None where none was given."""
    from slimkit.core.jobs.data import DataPlace

    if reference is None:
        return None
    place = DataPlace(reference, text_key, samples, max_length, batch_size)
    _ = place.kind  # refused now, and not after a model was loaded
    return place


@contextlib.contextmanager
def alone(out: Path, dry_run: bool = False) -> Iterator[Path | None]:
    """The folder of a resumable command, absolute and held against a second run; None for one that writes nothing."""
    from slimkit.core.locks import locked

    if dry_run:
        yield None
        return
    with locked(out.absolute(), "--out"):
        yield out.absolute()


def say_where(place: ModelPlace) -> str:
    """How lines for people call the model."""
    return str(place.model) if place.model is not None else str(place.factory)
