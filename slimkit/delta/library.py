"""Arguments of Hugging Face models by the names that versions of the library give them; an unknown name is an error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from slimkit.core.errors import UnsupportedError

import torch
from torch import nn

# What the keys and values of earlier tokens are called (5.24 renamed them), and how many tokens they are of.
CACHE = ("past_key_values", "cache")
CACHED_TOKENS = ("past_key_values_length", "cache_length")


def parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module class's forward, `self` first."""
    return _signature(kind).parameters


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def named(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of the names the module's forward has."""
    return next((n for n in names if n in parameters(type(module))), None)


def demand(module: nn.Module, names: tuple[str, ...], what: str) -> str:
    """Which of the names the module's forward has; UnsupportedError when none, which says what it is looked for."""
    found = named(module, names)
    if found is None:
        raise UnsupportedError(
            f"{type(module).__name__}.forward has no argument {' or '.join(names)}, by which {what}; "
            f"it takes {', '.join(list(parameters(type(module)))[1:])}. This version of its library is not known."
        )
    return found


def given(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that end up in ``**kwargs`` among them; defaults are left out."""
    kind: Any = type(module)
    bound = _signature(kind).bind(module, *args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in parameters(type(module)).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and found.pop(name, ()):
            raise UnsupportedError(f"{type(module).__name__}.forward was called with arguments that have no name.")
    found.pop(next(iter(parameters(type(module)))))
    return found


def cache_of(given: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Name and value of the cache among a call's arguments: by its name, and failing that by what it can do."""
    for name in (*CACHE, *given):
        value = given.get(name)
        if value is not None and not isinstance(value, torch.Tensor) and hasattr(value, "get_seq_length"):
            return name, value
    for name in CACHE:
        if isinstance(given.get(name), tuple):
            raise UnsupportedError(f"{name} is a tuple; a prefix or prompt needs one of the library's cache objects.")
    return None, None


def cached_tokens(given: Mapping[str, Any]) -> int:
    """The number of tokens in the cache of a call; 0 where there is none."""
    _, cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())
