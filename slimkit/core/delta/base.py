"""Values of the base that travel with a delta: the tensors they go into, and the tensors that places have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from slimkit.core.delta.bundle import compare_keys, compare_shapes
from slimkit.core.delta.tensors import bits
from slimkit.core.errors import FileFormatError

Array = np.ndarray[Any, Any]

HELD = "slimkit_base_with_delta"  # names of base tensors that came with a file and do not train


@dataclass(frozen=True)
class BaseValue:
    """A value for one tensor of the base.

    Args:
        value: the array.
        trains: whether the tensor trains from now on.
        own: what else holds the same tensor keeps the old value, unless it is given this one too.
        group: places with the same group hold one tensor afterwards; only with `own`.
        owner: the delta whose value it is, where several came together.
    """

    value: Array
    trains: bool = True
    own: bool = False
    group: str = ""
    owner: str = ""


class Placement(NamedTuple):
    """One value, the places it goes to, whether it trains, whether they get a tensor of their own, and whose it is."""

    names: tuple[str, ...]
    value: Array
    trains: bool
    split: bool
    owner: str = ""


def common(base: Mapping[str, Any]) -> list[list[str]]:
    """The names of each tensor of a model, the first one first.

    Example:
        >>> table = object()
        >>> common({"words": table, "norm": object(), "head": table})
        [['words', 'head'], ['norm']]
    """
    names: dict[int, list[str]] = {}
    for name, tensor in base.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def shared(base: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Of these tensors, those with several names: name -> the others."""
    chosen = set(names)
    return {n: [m for m in group if m != n] for group in common(base) if len(group) > 1 for n in group if n in chosen}


def place(base: Mapping[str, Any], values: Mapping[str, BaseValue], where: str) -> list[Placement]:
    """Where each value goes; nothing is changed.

    Args:
        base: name -> tensor of the model, a tensor held in several places under each name.
        values: name -> what the file says.
        where: the file, for messages.

    Raises:
        FileFormatError: the model lacks a tensor, has it in another shape, or one tensor is given two values.
    """
    compare_keys({n: 0 for n in values if n in base}, dict.fromkeys(values, 0), "the base model")
    compare_shapes({n: v.value for n, v in values.items()}, {n: tuple(base[n].shape) for n in values}, where)
    found = []
    for names in common(base):
        given = {n: values[n] for n in names if n in values}
        plain = {n: v for n, v in given.items() if not v.own}
        groups: dict[str, list[str]] = {}
        for name, value in given.items():
            if value.own:
                groups.setdefault(value.group or name, []).append(name)
        for group in [list(plain), *groups.values()]:
            _refuse_two(group, given, where)
        if not given:
            continue
        if not plain and len(groups) == 1 and len(given) == len(names):
            plain, groups = given, {}
        if plain:
            first = next(iter(plain))
            trains = any(v.trains for v in plain.values())
            found.append(Placement(tuple(plain), plain[first].value, trains, False, plain[first].owner))
        for group in groups.values():
            value = given[group[0]]
            # What is left of a tensor after all others took their own needs no other object.
            found.append(Placement(tuple(group), value.value, value.trains, True, value.owner))
    return found


def _refuse_two(names: list[str], given: Mapping[str, BaseValue], where: str) -> None:
    for name in names[1:]:
        if not np.array_equal(bits(given[names[0]].value), bits(given[name].value)):
            raise FileFormatError(f"{where} has different values for {names[0]} and {name}, which are one tensor here.")
