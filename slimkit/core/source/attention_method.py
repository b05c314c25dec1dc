"""The method in which a class writes its attention out: found along its bases, and edited to take a prefix in front."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from slimkit.core.source.attention_source import NoAttentionError, calls_softmax, with_prefix
from slimkit.core.source.generated import method_from


def softmax_method(kind: type, library: str) -> tuple[str, Any] | None:
    """The method of a class that calls a softmax, by name; None where no or only the library's own code does.

    Args:
        kind: the class.
        library: the framework's package, "torch" or "mindspore"; its classes and their bases are left out.
    """
    for owner in kind.__mro__:
        if owner.__module__.startswith(f"{library}."):
            return None
        for name, function in vars(owner).items():
            if inspect.isfunction(function) and _calls_softmax(function):
                return name, function
    return None


def edited_method(kind: type, library: str, transposed: frozenset[str] = frozenset()) -> tuple[str, Any]:
    """The name of that method, and the method as `with_prefix` edits it.

    Args:
        kind: the class.
        library: as above.
        transposed: attributes that multiply with their transposed second factor.

    Raises:
        NoAttentionError: the source holds no attention that can be extended; the message says what is missing.
    """
    found = softmax_method(kind, library)
    if found is None:
        raise NoAttentionError("none of its methods calls a softmax")
    name, function = found
    function = inspect.unwrap(function)
    if "__class__" in function.__code__.co_freevars:
        raise NoAttentionError(f"its {name} calls super()")
    return name, _edited(function, transposed)


@functools.cache
def _calls_softmax(function: Any) -> bool:
    try:
        return calls_softmax(inspect.getsource(function))
    except (OSError, TypeError):  # no source to be had: made at run time
        return False


@functools.cache
def _edited(function: Any, transposed: frozenset[str]) -> Any:
    owner = function.__qualname__.split(".")[-2]  # the class that wrote it, for names with two underscores
    return method_from(with_prefix(inspect.getsource(function), owner, transposed.__contains__), owner, function)
