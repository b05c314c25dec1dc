"""A stored model on other axes: a turned copy of what its stream touches, tensor by tensor, beside the job's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint import shards
from slimkit.core.checkpoint.weightfile import Entry, stream_safetensors
from slimkit.core.errors import UnsupportedError
from slimkit.core.log import progress
from slimkit.core.prune.rotation import Rotation, turned_paths, turned_value
from slimkit.core.prune.stream import Stream
from slimkit.stored import StoredModel, as_stored, stored_dtype
from slimkit.turning import turn

import torch

Array = np.ndarray[Any, Any]


def save_rotation(file: Path, rotation: Rotation) -> None:
    """Keep axes, so that a run which goes on turns by the same ones."""
    energy = {f"energy.{norm}": values for norm, values in rotation.energy.items()}
    files.write_tensors(file, {"axes": rotation.axes, "losses": rotation.losses, **energy})


def load_rotation(file: Path) -> Rotation:
    """The axes that `save_rotation` kept."""
    kept, _ = files.read_tensors(file, "rotation")
    energy = {key.partition(".")[2]: values for key, values in kept.items() if key.startswith("energy.")}
    return Rotation(kept["axes"], kept["losses"], energy)


def part_stored(stored: StoredModel, parted: Mapping[str, str]) -> None:
    """Let matrices be parameters of their own, in place; each has, until it is turned, the values of its table.

    Args:
        stored: the model.
        parted: parameter -> the table that it shares its tensor with.
    """
    for path, table in parted.items():
        stored.places[path] = stored.places[stored.keys(table)[0]]
    turn(stored.model, (), parted)


def turn_stored(
    folder: Path,
    stored: StoredModel,
    stream: Stream,
    rotation: Rotation,
    kept: Array,
    read: Callable[[str], Any],
) -> None:
    """Write a turned copy of every parameter that the stream touches, and let the model be read from there, in place.

    One parameter is in memory at a time, in float64; what is written already is not made again.

    Args:
        folder: for the copies; made where it is missing.
        stored: the model, its tied matrices apart.
        stream: of the model.
        rotation: its axes.
        kept: indices of the axes that will stay.
        read: path -> a parameter's values as they were.

    Raises:
        UnsupportedError: a parameter lies in several tensors of the files.
    """
    folder.mkdir(exist_ok=True)
    turned: dict[str, shards.Place] = {}
    for number, path in enumerate(progress(turned_paths(stream), "turned")):
        if not stored.is_whole(path):
            raise UnsupportedError(f"rotation needs {path} in one tensor of the files; prune the model in memory")
        key, file = stored.keys(path)[0], folder / f"{number}.safetensors"
        if not file.exists():
            place = stored.places[key]
            values = np.ascontiguousarray(turned_value(stream, rotation, kept, read, path))
            made = as_stored(torch.from_numpy(values).to(stored_dtype(place)))
            stream_safetensors(file, {key: Entry(place.dtype, place.shape)}, [(key, made)])
        turned[key] = shards.header(file)[key]
    stored.places.update(turned)
