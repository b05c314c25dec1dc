"""Factory references: the functions a recipe names, found and called with errors that say which key led there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from slimkit.core import check
from slimkit.core.errors import ConfigError, SlimkitError
from slimkit.core.jobs.fields import OneOf, Strict


class Factory(Strict):
    """A function that makes something: ``file.py:function`` beside the recipe, or ``package.module:function``."""

    factory: str = Field(description="file.py:function (beside the recipe) or package.module:function")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")


_which = Discriminator(lambda value: "Factory" if isinstance(value, Factory | Mapping) else "str")

Reference = Annotated[Annotated[Factory, Tag("Factory")] | Annotated[str, Tag("str")], _which]

# The losses that frameworks have by name.
LOSS_NAMES = ("cross_entropy", "mse")

# A loss by name, or a function f(model, batch).
LossReference = Annotated[
    Annotated[Factory, Tag("Factory")] | Annotated[str, OneOf(LOSS_NAMES, functions=True), Tag("str")],
    _which,
]


def parts(reference: Factory | str) -> tuple[str, dict[str, Any]]:
    """The text of a reference and the arguments that come with it.

    Example:
        >>> parts("task.py:model")
        ('task.py:model', {})
    """
    return (reference.factory, reference.arguments) if isinstance(reference, Factory) else (reference, {})


def resolve(reference: Factory | str, folder: Path, key: str) -> Callable[..., Any]:
    """Find the function that a factory reference names.

    Args:
        reference: ``file.py:function`` relative to `folder`, or ``package.module:function``, alone or in a Factory.
        folder: the recipe's folder.
        key: the recipe key it stands under, for messages.

    Returns:
        The function, with the reference's arguments not yet applied.

    Raises:
        ConfigError: the file, module or function does not exist, or importing it fails.
    """
    text, _ = parts(reference)
    place, _, function = text.partition(":")
    if not place or not function:
        raise ConfigError(f"{key}: must be file.py:function or package.module:function. Received: {text!r}")
    module = load(place, folder, key)
    if not callable(found := getattr(module, function, None)):
        options = [n for n in dir(module) if not n.startswith("_")]
        raise ConfigError(f"{key}: {place} has no function {function!r}{check.near(function, options)}")
    return found


def load(place: str, folder: Path, key: str) -> Any:
    """Import a file beside the recipe, or a module; whatever it raises names the key.

    Args:
        place: ``file.py`` relative to `folder`, or ``package.module``.
        folder: the recipe's folder.
        key: for messages.
    """
    try:
        return _load_file(folder / place) if place.endswith(".py") else importlib.import_module(place)
    except SlimkitError as error:
        raise ConfigError(f"{key}: {error}") from None
    except Exception as error:  # whatever the user's module raises is the user's to read, with the key in front
        raise ConfigError(f"{key}: importing {place} raised {type(error).__name__}: {error}") from error


def _load_file(file: Path) -> Any:
    from slimkit.core.files import readable_file

    readable_file(file, "factory file")
    name = f"slimkit_recipe_{file.stem}_{abs(hash(str(file.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and data-loader workers look their module up here
    # A factory file may import the files beside it, as a script may.
    beside = str(file.resolve().parent)
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(beside)
    return module


def make(reference: Factory | str, folder: Path, key: str, /, *args: Any, **extra: Any) -> Any:
    """Call a factory with its own arguments and `extra`; whatever it raises names the key."""
    function = resolve(reference, folder, key)
    text, arguments = parts(reference)
    try:
        return function(*args, **{**arguments, **extra})
    except SlimkitError:
        raise
    except Exception as error:  # as above: the message must say which key of the recipe led here
        raise ConfigError(f"{key}: {text} raised {type(error).__name__}: {error}") from error
