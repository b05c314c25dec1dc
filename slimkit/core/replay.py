"""State that a forward leaves behind, such as caches and counters: remembered before a batch, put back after it."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

# Objects of these packages hold no state of a user's forward; some would lead to whole trainers or stored weights.
FOREIGN = {"torch", "mindspore", "numpy", "accelerate", "lightning", "pytorch_lightning", "slimkit", "slimkit_ms"}

# Where a pruned model keeps its plans: many thousands of numbers, which no forward changes.
PLANS = "_slimkit_plans"

# How many objects deep a cache may lie in an attribute: a cache holds layers, and they hold tensors.
DEPTH = 4


class Copying(Protocol):
    """How a framework's tensors are copied."""

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor whose contents a forward may change in place."""

    def is_module(self, value: Any) -> bool:
        """Whether a value is a module: its state is remembered by itself."""

    def clone(self, tensor: Any) -> Any:
        """A copy of a tensor, without gradient."""


class Tensors(Copying, Protocol):
    """What a framework does with the tensors that a module holds or is given."""

    def remember(self, tensor: Any) -> Any:
        """What `changed` and `put_back` need to know of a tensor as it is now."""

    def changed(self, tensor: Any, before: Any) -> bool:
        """Whether a tensor's contents are no longer what they were."""

    def put_back(self, tensor: Any, before: Any) -> None:
        """Give a tensor its contents again, in place."""


def is_own(kind: type) -> bool:
    """Whether a module's class belongs to a framework or to this package, whose layers keep no state in eval mode."""
    name = kind.__module__ + "."
    return name.startswith(("torch.", "mindspore.", "slimkit.", "slimkit_ms.")) and not name.startswith("torch.ao.")


class State:
    """What some modules hold: attributes, buffers, and everything that these reach.

    Args:
        holders: for each module its attributes or buffers by name, and the names to leave out.
        tensors: the framework's part.
        also: tensors that no holder leads to.
    """

    def __init__(
        self, holders: Iterable[tuple[dict[str, Any], frozenset[str]]], tensors: Tensors, also: Iterable[Any] = ()
    ) -> None:
        self._tensors = tensors
        self._known: set[int] = set()
        self._dicts: list[tuple[dict[Any, Any], frozenset[str], dict[Any, Any]]] = []
        self._others: list[tuple[Any, Any]] = []  # lists, queues and sets
        self._held: list[tuple[Any, Any]] = [(tensor, tensors.remember(tensor)) for tensor in also]
        for holder, without in holders:
            self._note_dict(holder, without, 0)

    def _note_dict(self, holder: dict[Any, Any], without: frozenset[str], depth: int) -> None:
        values = {k: v for k, v in holder.items() if k not in without}
        self._dicts.append((holder, without, values))
        for value in values.values():
            self._note(value, depth)

    def _note(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, str, bytes, type)) or id(value) in self._known:
            return
        if self._tensors.is_module(value):
            return
        self._known.add(id(value))  # what is remembered stays alive, so an id stands for one object
        if self._tensors.is_tensor(value):
            self._held.append((value, self._tensors.remember(value)))
        elif isinstance(value, np.ndarray):
            self._others.append((value, value.copy()))
        elif isinstance(value, dict):
            self._note_dict(value, frozenset(), depth)
        elif isinstance(value, (list, deque, set)):
            self._others.append((value, list(value)))
            for part in value:
                self._note(part, depth)
        elif isinstance(value, (tuple, frozenset)):
            for part in value:
                self._note(part, depth)
        elif depth < DEPTH and _may_hold_state(value):
            self._note_dict(vars(value), frozenset(), depth + 1)

    def differs(self) -> bool:
        """Whether anything changed."""
        return (
            any(not _alike(_without(holder, without), values) for holder, without, values in self._dicts)
            or any(not _same(holder, before) for holder, before in self._others)
            or any(self._tensors.changed(tensor, before) for tensor, before in self._held)
        )

    def restore(self) -> None:
        """Put everything back, in place."""
        for holder, without, values in self._dicts:
            now = _without(holder, without)
            if not _alike(now, values):
                for key in now.keys() - values.keys():
                    del holder[key]
                holder.update(values)
        for holder, before in self._others:
            if not _same(holder, before):
                if isinstance(holder, np.ndarray):
                    holder[...] = before
                else:
                    holder.clear()
                    (holder.update if isinstance(holder, set) else holder.extend)(before)
        for tensor, before in self._held:
            if self._tensors.changed(tensor, before):
                self._tensors.put_back(tensor, before)


def _may_hold_state(value: Any) -> bool:
    root = type(value).__module__.partition(".")[0]
    return root not in FOREIGN and root not in sys.stdlib_module_names and isinstance(vars_of(value), dict)


def vars_of(value: Any) -> dict[str, Any] | None:
    """An object's attributes; None for one without."""
    try:
        return vars(value)
    except TypeError:
        return None


def _without(holder: dict[Any, Any], names: frozenset[str]) -> dict[Any, Any]:
    return {k: v for k, v in holder.items() if k not in names} if names else holder


def _alike(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return len(now) == len(before) and all(k in now and now[k] is v for k, v in before.items())


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return np.array_equal(now, before)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before))


def fresh(value: Any, tensors: Copying, known: dict[int, Any] | None = None) -> Any:
    """A copy of what a call is given that the call may change: tensors, containers, caches; the rest as it is.

    Args:
        value: arguments in any nesting; an object that stands there twice does so in the copy.
        tensors: the framework's part.
        known: id -> copy of what was copied already.
    """
    known = {} if known is None else known
    if value is None or isinstance(value, (bool, int, float, str, bytes, type)) or tensors.is_module(value):
        return value
    if id(value) in known:
        return known[id(value)]
    if tensors.is_tensor(value):
        made = tensors.clone(value)
    elif isinstance(value, Mapping):
        made = like_mapping(value, {k: fresh(v, tensors, known) for k, v in value.items()})
    elif isinstance(value, (tuple, list)):
        made = like_sequence(value, [fresh(v, tensors, known) for v in value])
    elif _may_hold_state(value):
        made = copy.copy(value)
        known[id(value)] = made
        vars(made).update({k: fresh(v, tensors, known) for k, v in vars(value).items()})
    else:
        made = value
    known[id(value)] = made
    return made


def like_mapping(value: Mapping[str, Any], items: dict[str, Any]) -> Any:
    """A mapping of the same kind with other values, where its kind is made of its items; else a dict."""
    if dataclasses.is_dataclass(value):
        return type(value)(**items)
    return items


def like_sequence(value: Any, items: list[Any]) -> Any:
    """A tuple or list of the same kind with other values, named fields included."""
    return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
