"""Models as the command line names them: opened from directories, weight files and factories, and written again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge, checkpoint, prune
from slimkit.core import files
from slimkit.core.checkpoint.maker import write_maker
from slimkit.core.errors import ArgumentError, ConfigError, FileFormatError, SlimkitError, UnsupportedError
from slimkit.core.examples import described
from slimkit.core.jobs import folders
from slimkit.core.jobs.framework import Opened
from slimkit.core.jobs.sources import ModelPlace
from slimkit.core.jobs.work import largest_gap
from slimkit.core.lazy import library

import torch
from torch import nn


def open_model(place: ModelPlace, *, kind: str | None = None, fresh: tuple[str, ...] = (), **config: Any) -> Opened:
    """Open the model that a command line names, in eval mode.

    Args:
        place: the model.
        kind: name of a class of transformers (``AutoModelForCausalLM``) instead of the one the directory was saved by.
        fresh: words in the names of parameters that may be missing in the files, because they are about to be trained.
        config: fields of the configuration to change.

    Returns:
        The model.

    Raises:
        ConfigError: the directory or the factory does not give a model.
        FileFormatError: files are damaged, or lack tensors of the model.
    """
    if place.factory is not None:
        return _made(place)
    directory = place.model
    assert directory is not None
    if not directory.is_dir():
        raise ConfigError(
            f"{place.option} {directory} is a file of weights: give --factory MODULE:FUNCTION for its network"
        )
    if (directory / folders.PLAN).exists() and (directory / folders.BASE / "config.json").exists():
        base, empty = architecture(directory / folders.BASE, kind)
        model = prune.load_pruned(directory, empty(base))
        return Opened(model.eval(), place, directory, files.read_json(directory / folders.PLAN))
    if not (directory / "config.json").exists():
        raise ConfigError(
            f"{place.option} must be a Hugging Face directory (with config.json), or have a --factory. "
            f"Received: {str(directory)!r}"
        )
    _, maker = architecture(directory, kind)
    model, told = _quietly(directory, lambda: maker.from_pretrained(str(directory), output_loading_info=True, **config))
    drawn = tuple(n for n in sorted(told["missing_keys"]) if any(word in n for word in fresh))
    missing = [n for n in sorted(told["missing_keys"]) if n not in drawn]
    odd = [*missing, *(str(m[0]) if isinstance(m, tuple) else str(m) for m in told.get("mismatched_keys", ()))]
    if odd:
        raise FileFormatError(f"{directory} lacks tensors of its model, or has them in another shape: {odd[:5]}")
    return Opened(model.eval(), place, directory, fresh=drawn)


def _made(place: ModelPlace) -> Opened:
    model = bridge.check_model(place.make(), "the model that --factory returns")
    if place.model is None:
        return Opened(model.eval(), place)
    if place.model.is_dir() and (place.model / folders.PLAN).exists():
        desc = files.read_json(place.model / folders.PLAN)
        return Opened(prune.load_pruned(place.model, model).eval(), place, place.model, desc)
    checkpoint.load_checkpoint(place.model, model, strict_load=True)
    return Opened(model.eval(), place, place.model if place.model.is_dir() else None)


def _quietly(directory: Path, load: Any) -> Any:
    """Run a loader of transformers; what it raises names the directory in one line."""
    try:
        return load()
    except SlimkitError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{directory} cannot be opened by transformers: {reason}") from None


def architecture(directory: Path, kind: str | None = None) -> tuple[Any, Any]:
    """A directory's configuration and the class of transformers that it was saved by; no weights are read."""
    transformers = library("transformers", "hf")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a log file is no place for bars
    config = _quietly(directory, lambda: transformers.AutoConfig.from_pretrained(str(directory)))
    if kind is not None:
        return config, getattr(transformers, kind)
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return config, getattr(transformers, name)
    raise UnsupportedError(f"{directory / 'config.json'} names no class of transformers under 'architectures'")


def own_example(model: nn.Module, length: int, seed: int) -> Any:
    """An input that a model of transformers describes: `length` tokens of text, an image, sound, or dummy inputs."""
    main = getattr(model, "main_input_name", "input_ids")
    takes = inspect.signature(model.forward).parameters
    try:
        found = tensors(described(model.config, main, takes, length=length, seed=seed))
    except ArgumentError:
        dummy: Any = model.dummy_inputs
        return {k: v for k, v in dummy.items() if isinstance(v, torch.Tensor)}
    return {**found, "attention_mask": torch.ones_like(found[main])} if [*found] == ["input_ids"] else found


def from_config(folder: Path, arrays: Mapping[str, Any]) -> nn.Module:
    """The model of transformers that a folder's config.json describes, with these values."""
    config, kind = architecture(folder)
    model: nn.Module = kind(config)
    told = model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=False)
    own = model.state_dict()
    held = {own[name].data_ptr() for name in arrays if name in own}
    missing = [name for name in told.missing_keys if own[name].data_ptr() not in held]  # tied ones are stored once
    odd = [*missing, *told.unexpected_keys]
    if odd:
        raise FileFormatError(f"{folder} must hold exactly the tensors of its model; these differ: {odd[:5]}")
    return model.eval()


def tensors(value: Any) -> Any:
    """NumPy arrays, alone or in a dict, as tensors of their own memory."""
    if isinstance(value, dict):
        return {k: torch.from_numpy(v.copy()) for k, v in value.items()}
    return torch.from_numpy(value.copy())


def reloaded(opened: Opened, folder: Path, outputs: Callable[[nn.Module], list[Any]]) -> tuple[float, float]:
    """(Largest difference between the outputs of the model and of the one that `from_pretrained` reads from the folder,
    largest output)."""
    kind: Any = type(opened.model)
    here, there = outputs(opened.model), outputs(_quietly(folder, lambda: kind.from_pretrained(str(folder)).eval()))
    return largest_gap(here, there), max((float(np.abs(a).max()) for a in here if a.size), default=0.0)


def write_model(opened: Opened, folder: Path) -> str:
    """Write an opened (and changed) model into a folder that is being filled.

    Args:
        opened: the model, with the plan if it was pruned.
        folder: exists and is empty.

    Returns:
        "transformers" where ``from_pretrained`` reads the folder, "slimkit" where the commands here (and
        `load_pruned`) do, "weights" for the file of a factory's network.
    """
    model, plain = opened.model, opened.is_hf and prune.config_mismatch(opened.model) == ""
    if opened.is_hf and not plain and opened.desc is None:
        raise UnsupportedError(
            "the model no longer has the shapes of its configuration, and no plan says how it was cut"
        )
    if plain:
        # The class, not the directory, says which tensors are tied.
        model.save_pretrained(str(folder))
    elif opened.desc is not None:
        prune.save_pruned(folder, model, opened.desc)
    else:
        checkpoint.save_checkpoint(model, folder / "model.safetensors")
    if opened.place.factory is not None:
        write_maker(folder, opened.place.factory, opened.place.arguments)
    if opened.is_hf:
        assert opened.directory is not None
        folders.copy_companions(opened.directory, folder)
        if not plain:
            old = opened.directory / folders.BASE / "config.json"
            config = files.read_json(old if old.exists() else opened.directory / "config.json")
            (folder / folders.BASE).mkdir()
            files.write_json(folder / folders.BASE / "config.json", config)
    if plain and opened.desc is not None:
        files.write_json(folder / folders.PLAN, opened.desc)
    return "transformers" if plain else "slimkit" if opened.desc is not None else "weights"
