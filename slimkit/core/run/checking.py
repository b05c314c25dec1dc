"""A look at a recipe before it runs: every configuration built, every function found, one batch read; no model made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs import factory
from slimkit.core.jobs.options import (
    AdaptOptions,
    CutOptions,
    DistillOptions,
    ExportOptions,
    FitOptions,
    PruneOptions,
    SparsifyOptions,
    TrainOptions,
)
from slimkit.core.jobs.work import comparison
from slimkit.core.run.recipe import Recipe

_NAMED_LOSSES = ("cross_entropy", "mse")


def check_recipe(recipe: Recipe, folder: Path, formats: Sequence[str]) -> Mapping[str, Any]:
    """Find what is wrong with a recipe without running it.

    Args:
        recipe: as it was read.
        folder: the recipe's folder.
        formats: what the framework can export.

    Returns:
        What the data function returned.

    Raises:
        ConfigError: an option, a function, its arguments or the data; the message begins with the key's path.
    """
    check_stages(recipe, folder, formats)
    _calls(recipe.model, folder, "model")
    _calls(recipe.data, folder, "data")
    if recipe.metrics is not None:
        _calls(recipe.metrics, folder, "metrics", "model", "data", "dense")
    for at, (kind, options) in enumerate(recipe.steps()):
        key = f"stages[{at}].{kind}"
        if isinstance(options, CutOptions):
            _calls(recipe.model, folder, f"{key}.arguments", **options.arguments)
            if options.weights is not None:
                _calls(options.weights, folder, f"{key}.weights")
        if (reference := _loss(recipe, options)) not in _NAMED_LOSSES:
            _calls(reference, folder, "loss", "model", "batch")
    data: Mapping[str, Any] = factory.make(recipe.data, folder, "data")
    check_data(recipe, data)
    _read_one(recipe, data)
    return data


def check_stages(recipe: Recipe, folder: Path, formats: Sequence[str] | None = None) -> None:
    """Build the configuration of every stage, and find every function that the recipe names; nothing is called."""
    for key, reference in (("model", recipe.model), ("data", recipe.data), ("metrics", recipe.metrics)):
        if reference is not None:
            factory.resolve(reference, folder, key)
    for at, (kind, options) in enumerate(recipe.steps()):
        key = f"stages[{at}].{kind}"
        try:
            _build(options, folder, key, formats)
        except SlimkitError as error:
            said = str(error)
            raise ConfigError(said if said.startswith(key) else f"{key}: {said}") from error
        if (reference := _loss(recipe, options)) not in _NAMED_LOSSES:
            factory.resolve(reference, folder, "loss" if reference is recipe.loss else f"{key}.loss")


def _loss(recipe: Recipe, options: Any) -> Any:
    """The loss that a stage minimises on labels; a name where it reads none."""
    if not isinstance(options, TrainOptions | AdaptOptions | DistillOptions):
        return _NAMED_LOSSES[0]
    if isinstance(options, DistillOptions) and not options.hard_weight:
        return _NAMED_LOSSES[0]
    return recipe.loss if options.loss is None else options.loss


def _build(options: Any, folder: Path, key: str, formats: Sequence[str] | None) -> None:
    """The configuration of one stage, as far as no model is needed."""
    if isinstance(options, SparsifyOptions):
        options.config()
    elif isinstance(options, PruneOptions) and ":" in options.importance:
        factory.resolve(options.importance, folder, f"{key}.importance")
    elif isinstance(options, CutOptions):
        options.config()
        if options.weights is not None:
            factory.resolve(options.weights, folder, f"{key}.weights")
    elif isinstance(options, DistillOptions):
        # Whatever the answer's shape will be; a loss of "auto" is chosen by it.
        comparison(options, lambda: (2, 2), lambda name: f"{key}.{name}").spec()
    elif isinstance(options, AdaptOptions):
        options.check()
    elif isinstance(options, ExportOptions):
        from slimkit.core.onnxaxes import parse_axes

        parse_axes(options.dynamic or [])
        for form in options.formats or ():
            if formats is not None and form not in formats:
                raise ConfigError(f"{key}.formats: {form} is not written by this framework")


def _calls(reference: Any, folder: Path, key: str, *positional: str, **more: Any) -> None:
    """Refuse a function that cannot be called with what it will get."""
    function = factory.resolve(reference, folder, key)
    text, arguments = factory.parts(reference)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a built-in tells no signature
        return
    try:
        signature.bind(*positional, **{**arguments, **more})
    except TypeError as error:
        raise ConfigError(f"{key}: {text} cannot be called: {error}") from None


def check_data(recipe: Recipe, data: Any) -> None:
    """Refuse data without what the stages read."""
    if not isinstance(data, Mapping) or not {"train", "example"} <= set(data):
        raise ConfigError("data: the factory must return a mapping with at least the keys train and example")
    for at, (kind, options) in enumerate(recipe.steps()):
        wants = False
        if isinstance(options, SparsifyOptions):
            wants = options.config().needs_data
        elif isinstance(options, PruneOptions):
            wants = options.needs_data or bool(options.calibration_batches or options.compensation_batches)
        if wants and not data.get("calibration"):
            raise ConfigError(
                f"stages[{at}].{kind}: needs calibration batches; the data factory returned no key 'calibration'"
            )


def _read_one(recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Read one batch (of a data set: one sample) of what the stages train on, and one to calibrate on."""
    stages = list(enumerate(recipe.steps()))
    for at, (kind, options) in stages:
        if not isinstance(options, FitOptions):
            continue
        one = _first(data["train"], "train")
        named = _loss(recipe, options) in _NAMED_LOSSES
        labelled = not isinstance(options, DistillOptions) or bool(options.hard_weight)
        if labelled and named and not (isinstance(one, tuple | list) and len(one) == 2):
            raise ConfigError(
                f"stages[{at}].{kind}: the loss reads (inputs, labels), and data['train'] gives a {type(one).__name__}"
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
