"""A look at a recipe before it runs: every configuration built, every function found, one batch read; no model made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs import crew, factory, fitting
from slimkit.core.jobs.options import CutOptions, DistillOptions, ExportOptions, FitOptions
from slimkit.core.run.language import model_folder
from slimkit.core.run.recipe import Recipe


def check_recipe(recipe: Recipe, folder: Path, formats: Sequence[str]) -> None:
    """Find what is wrong with a recipe without running it.

    Args:
        recipe: as it was read.
        folder: the recipe's folder.
        formats: what the framework can export.

    Raises:
        ConfigError: an option, a function, its arguments or the data; the message begins with the key's path.
    """
    check_stages(recipe, folder)
    made = model_folder(recipe, folder) is None
    if made:
        _calls(recipe.model, folder, "model")
    if recipe.data is not None:
        _calls(recipe.data, folder, "data")
    if recipe.metrics is not None:
        _calls(recipe.metrics, folder, "metrics", "model", "data", "dense")
    if recipe.samples is not None:
        _calls(recipe.samples, folder, "samples", "model", "data")
    for key, options in _stages(recipe):
        if isinstance(options, CutOptions) and made:
            _calls(recipe.model, folder, f"{key}.arguments", **options.arguments)
        if isinstance(options, ExportOptions) and (odd := set(options.formats or ()) - set(formats)):
            raise ConfigError(f"{key}.formats: {', '.join(sorted(odd))} is not written by this framework")
        for name, (reference, positional) in options.functions().items():
            if positional:
                _calls(reference, folder, f"{key}.{name}", *positional)
        if isinstance(options, FitOptions) and options.labelled and recipe.loss not in factory.LOSS_NAMES:
            _calls(recipe.loss, folder, "loss", "model", "batch")
    data = {} if recipe.data is None else factory.make(recipe.data, folder, "data")
    if recipe.data is not None:
        check_data(recipe, data)
    _read_one(recipe, data)


def check_stages(recipe: Recipe, folder: Path) -> None:
    """Build the configuration of every stage, and find every function that the recipe names; nothing is called."""
    made = model_folder(recipe, folder) is None
    for name in ("model", "data", "metrics", "samples"):
        if (found := getattr(recipe, name)) is not None and (made or name != "model"):
            factory.resolve(found, folder, name)
    if recipe.loss not in factory.LOSS_NAMES:
        factory.resolve(recipe.loss, folder, "loss")
    for key, options in _stages(recipe):
        if isinstance(options, CutOptions) and not made:
            raise ConfigError(f"{key}: needs a model factory, whose arguments make the smaller instance")
        try:
            options.build()
        except SlimkitError as error:
            raise ConfigError(f"{key}: {error}") from error
        for name, (reference, _) in options.functions().items():
            factory.resolve(reference, folder, f"{key}.{name}")


def _stages(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(f"stages[{at}].{kind}", options) for at, (kind, options) in enumerate(recipe.steps())]


def _calls(reference: Any, folder: Path, key: str, /, *positional: str, **more: Any) -> None:
    """Refuse a function that cannot be called with what it will get."""
    function = factory.resolve(reference, folder, key)
    text, arguments = factory.parts(reference)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a built-in has no signature
        return
    try:
        signature.bind(*positional, **{**arguments, **more})
    except TypeError as error:
        raise ConfigError(f"{key}: {text} cannot be called: {error}") from None


def check_data(recipe: Recipe, data: Any) -> None:
    """Refuse data without what the stages read."""
    needed = {"train", "example"} if recipe.data is not None or _trains(recipe) else {"example"}
    if not isinstance(data, Mapping) or not needed <= set(data):
        raise ConfigError("data: the factory must return a mapping with at least the keys train and example")
    for key, options in _stages(recipe):
        if options.needs_data and recipe.calibrate is None and not data.get("calibration"):
            raise ConfigError(f"{key}: needs calibration batches; the data factory returned no key 'calibration'")
        if isinstance(options, FitOptions):
            source = _source(key, data)
            if isinstance(data[source], list) and data[source]:  # a loader is read by --check alone
                _refuse_labels(key, options, source, data[source][0], data["example"])


def read_alike(recipe: Recipe, data: Mapping[str, Any]) -> list[Any]:
    """What every process of a run must have been given alike; nothing for one process.

    Raises:
        ConfigError: what a stage trains on cannot be shared out evenly.
    """
    if crew.size() == 1:
        return []
    found = [data["example"], *(data.get("calibration") or ())]
    for key, options in _stages(recipe):
        if isinstance(options, FitOptions):
            samples = data[_source(key, data)]
            fitting.share_of(options, samples, f"{key}.batch_size")
            # A data set may draw anew whenever it is read.
            found.append(samples if isinstance(samples, (list, tuple)) else getattr(samples, "__len__", int)())
    return found


def _source(key: str, data: Mapping[str, Any]) -> str:
    """The key of the data that a stage trains on."""
    kind = key.rpartition(".")[2]
    return kind if kind in data else "train"


def _refuse_labels(key: str, options: FitOptions, source: str, one: Any, example: Any) -> None:
    """A distillation without labels gives the student all of a batch, so labels in it would be inputs."""
    if isinstance(options, DistillOptions) and not options.labelled and _is_pair(one) and not _is_pair(example):
        raise ConfigError(
            f"{key}: learns from inputs alone, and data[{source!r}] gives (inputs, labels): give it hard_weight, or "
            "inputs under the key 'distill'"
        )


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple | list) and len(one) == 2


def _trains(recipe: Recipe) -> bool:
    return any(isinstance(options, FitOptions) for _, options in _stages(recipe))


def _read_one(recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Read one batch (of a data set: one sample) of what the stages train on, and one to calibrate on."""
    for key, options in _stages(recipe):
        if not isinstance(options, FitOptions):
            continue
        source = _source(key, data)
        one = _first(data[source], source)
        _refuse_labels(key, options, source, one, data["example"])
        loss = recipe.loss if options.loss is None else options.loss
        if options.labelled and loss in factory.LOSS_NAMES and not _is_pair(one):
            raise ConfigError(
                f"{key}: the loss reads (inputs, labels), and data[{source!r}] gives a {type(one).__name__}"
            )
    if data.get("calibration"):
        _first(data["calibration"], "calibration")


def _first(source: Any, key: str) -> Any:
    try:
        return next(iter(source))
    except StopIteration:
        raise ConfigError(f"data[{key!r}] holds nothing") from None
    except SlimkitError:
        raise
    except Exception as error:  # the user's data set raises what it likes
        raise ConfigError(f"data[{key!r}]: reading one batch raised {type(error).__name__}: {error}") from error
