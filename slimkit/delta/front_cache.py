"""A prefix or prompt in a library's cache, which the library counts as its own tokens only while its model runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from slimkit import bridge
from slimkit.delta import library

__all__ = ["bridge", "cache_in", "hide_front", "show_front"]


class _Fronted:
    """Between runs a cache is as long as its text: `generate` cuts the text at that length, and crops to it."""

    front_tokens: int
    front_shows: bool

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        length = super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return length if self.front_shows or not length else length - self.front_tokens

    def crop(self, max_length: int, *args: Any, **kwargs: Any) -> Any:
        front = self.front_tokens if max_length > 0 else 0  # other numbers count from the end
        return super().crop(max_length + front, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _class_of(kind: Any) -> type:
    return type(f"Fronted{kind.__name__}", (_Fronted, kind), {"__module__": __name__})


def show_front(cache: Any) -> None:
    """Let a cache have all of its tokens, for a run of the model; in place."""
    if isinstance(cache, _Fronted):
        cache.front_shows = True


def hide_front(cache: Any, tokens: int) -> None:
    """Let a cache that holds this many tokens in front of the text be as long as the text, in place."""
    if cache is None:
        return
    if not isinstance(cache, _Fronted):
        kind: Any = type(cache)
        cache.__class__ = _class_of(kind)
    cache.front_tokens, cache.front_shows = tokens, False


def cache_in(kwargs: Mapping[str, Any], out: Any) -> Any:
    """The cache that a run was given, and failing that the one it made; None without one."""
    _, cache = library.cache_of(kwargs)
    if cache is None and isinstance(out, (Mapping, tuple)):
        found = out.values() if isinstance(out, Mapping) else out
        cache = next((value for value in found if hasattr(value, "get_seq_length")), None)
    return cache
