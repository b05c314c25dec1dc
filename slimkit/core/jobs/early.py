"""What can be refused before a model is loaded: functions that are not there, missing data, texts that are too long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders, sources
from slimkit.core.jobs.fields import flag_of
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace
from slimkit.core.jobs.training_options import JobOptions

# What a configuration calls the number of positions that its model knows.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
_LANGUAGE = ("ForCausalLM", "LMHeadModel")


def check(place: ModelPlace, options: JobOptions, *, calib: DataPlace | None = None) -> None:
    """Look at all that a command was given and that no model is needed for.

    Args:
        place: the model.
        options: of the job.
        calib: calibration data, where any was given.

    Raises:
        ConfigError: a function cannot be found, or the job needs data and has none.
    """
    for key, (reference, _) in options.functions().items():
        if isinstance(reference, str):
            sources.found(reference, flag_of(type(options), key).names[0])
    if calib is None and options.needs_data:
        raise ConfigError("--calib DATA is needed: calibration batches, which nothing else gives")
    if calib is None and isinstance(options, PruneOptions) and options.importance == "auto" and _is_language(place):
        raise ConfigError(
            "--calib DATA is needed: calibration batches, which nothing else gives. Weights alone do not tell what a "
            "language model can lose; --importance l1 goes by them all the same"
        )


def text_length(place: ModelPlace, asked: int | None, usual: int = 128) -> int:
    """Tokens of a made-up text: what was asked for, or the usual number where the model knows as many positions.

    Raises:
        ConfigError: more were asked for than the model knows.
    """
    config, length = configuration(place), asked or usual
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in _POSITIONS:
            known = part.get(key)
            if not isinstance(known, int) or not 0 < known < length:
                continue
            if asked:
                raise ConfigError(f"--length {length}: the model knows {known} positions ({key} of its configuration)")
            length = known
    return length


def configuration(place: ModelPlace) -> Mapping[str, Any]:
    """The configuration of a Hugging Face folder, or of the model that a folder was pruned from; else empty."""
    if place.factory is not None or place.model is None:
        return {}
    for file in (place.model / "config.json", place.model / folders.BASE / "config.json"):
        found = files.read_json(file) if file.is_file() else None
        if isinstance(found, Mapping):
            return found
    return {}


def _is_language(place: ModelPlace) -> bool:
    names = configuration(place).get("architectures") or ()
    return any(str(name).endswith(_LANGUAGE) for name in names)
