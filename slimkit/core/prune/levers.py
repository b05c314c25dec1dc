"""Levers: the widths that may be cut freely, and what must move with each of them.

Without further demands every dimension variable is a lever of its own. Where one number of a configuration speaks of
several widths (all feed-forward layers, heads and the hidden width), they are one lever: a step of it takes so many
indices of each. The allocation turns levers; what is counted is the same polynomial, with the widths written as steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from slimkit.core.prune.allocate import Account, least_places
from slimkit.core.prune.solve import View

Array = np.ndarray[Any, Any]
Row = dict[str, Fraction]


@dataclass(frozen=True)
class Lever:
    """Widths that are cut together.

    Args:
        name: the first variable's name.
        size: steps before pruning.
        members: variable -> indices a step.
        says: configuration field -> what a step takes off its value.
    """

    name: str
    size: int
    members: Mapping[str, int]
    says: Mapping[str, Fraction] = field(default_factory=dict)

    def counts(self, steps: int) -> dict[str, int]:
        """Indices that each member keeps of so many steps."""
        return {variable: each * steps for variable, each in self.members.items()}


def free_levers(view: View) -> list[Lever]:
    """One lever a variable: cuts of any shape."""
    return [Lever(v.name, v.size, {v.name: 1}) for v in view.variables]


def counts_experts(view: View, lever: Lever) -> bool:
    """Whether a lever counts experts, which are no width."""
    return {v.kind for v in view.variables if v.name in lever.members} == {"experts"}


def inner_levers(
    view: View,
    account: Account,
    levers: Sequence[Lever],
    sizes: Sequence[int],
    limits: tuple[float, float, int],
    places: Mapping[str, Sequence[int]],
) -> set[str] | None:
    """The levers that a measured cut may turn: those that leave the hidden width whole, since every layer reads it;
    None for all, where they would not do.

    Args:
        view: the coupling.
        account: what is counted.
        levers: in the account's order.
        sizes: steps of each.
        limits: the number not to exceed, the least share that each keeps, and the alignment.
        places: lever -> where alone it may stand beside a whole hidden width.
    """
    target, least, alignment = limits
    hidden = {v.name for v in view.variables if v.kind == "hidden"}
    outer = [bool(hidden & x.members.keys()) for x in levers]
    floors = least_places(account, account.floors(sizes, least, alignment), places)
    counts = [size if whole else int(f) for size, whole, f in zip(sizes, outer, floors)]
    if account.count(np.array(counts, dtype=np.int64)) > target:
        return None
    return {x.name for x, whole in zip(levers, outer) if not whole}


def joined_scores(lever: Lever, scores: Mapping[str, Array]) -> Array:
    """A score for each step of a lever, ascending: what its members lose with that step, on the mean."""
    members = [np.sort(scores[name]).reshape(lever.size, each).mean(axis=1) for name, each in lever.members.items()]
    mean: Array = np.mean(members, axis=0)
    return mean


def joined_losses(levers: Sequence[Lever], sizes: Sequence[int], losses: Mapping[str, Array]) -> dict[str, Array]:
    """The loss taken when each step of a lever has gone: the sum over its members; none where a member's is unknown.

    Example:
        >>> lever = Lever("a", 2, {"a": 2, "b": 1})
        >>> losses = {"a": np.array([1.0, 2.0, 4.0, 8.0]), "b": np.array([10.0, 20.0])}
        >>> joined_losses([lever], [2], losses)["a"].tolist()
        [12.0, 28.0]
    """
    # A loss counts everything gone before it too, so that of a step is its last index's. Steps beyond `size` go always.
    return {
        x.name: np.sum([np.sort(losses[n]).reshape(x.size, -1)[:, -1] for n in x.members], axis=0)[x.size - size :]
        for x, size in zip(levers, sizes)
        if all(n in losses for n in x.members)
    }


def lever_matrix(
    names: Sequence[str], full: Mapping[str, int], levers: Sequence[Lever], fixed: Mapping[str, int]
) -> tuple[Array, Array]:
    """Counts of all variables as offsets + matrix @ steps of the levers that are not fixed; a variable of no lever
    keeps all."""
    counts = {**full}
    for lever in levers:
        if lever.name in fixed:
            counts.update(lever.counts(fixed[lever.name]))
    offsets = np.array([counts[n] for n in names], dtype=np.int64)
    free = [lever for lever in levers if lever.name not in fixed]
    matrix = np.zeros((len(names), len(free)), dtype=np.int64)
    place = {name: k for k, name in enumerate(names)}
    for column, lever in enumerate(free):
        for name, each in lever.members.items():
            offsets[place[name]], matrix[place[name], column] = 0, each
    return offsets, matrix


def solve_levers(rows: Iterable[Row], variables: Mapping[str, int], numbers: Sequence[str]) -> list[Lever]:
    """The levers that linear demands leave.

    Args:
        rows: each a sum of coefficient times change that must be zero, over variables and fields.
        variables: variable -> size.
        numbers: the fields, which may change freely as far as the rows allow.

    Returns:
        The levers; a variable in none of them cannot be cut. Where one variable would move with several fields that
        are free of each other, all of them stay.

    Example:
        >>> one = Fraction(1)
        >>> rows = [{"d0": 8 * one, "hidden": -one}, {"d1": one, "hidden": -one}]
        >>> found = solve_levers(rows, {"d0": 8, "d1": 64}, ["hidden"])
        >>> [(x.size, dict(x.members)) for x in found]
        [(8, {'d0': 1, 'd1': 8})]
    """
    order = [*variables, *numbers]
    pivots = _reduced(rows, {name: k for k, name in enumerate(order)})
    free = [name for name in order if name not in pivots]
    moves: dict[str, dict[str, Fraction]] = {name: {name: Fraction(1)} for name in free}
    for name, row in pivots.items():
        for other, value in row.items():
            if other != name:
                moves[other][name] = -value
    users: dict[str, list[str]] = {}
    for name, move in moves.items():
        for variable in variables.keys() & move.keys():
            users.setdefault(variable, []).append(name)
    tangled = {name for names in users.values() if len(names) > 1 for name in names}
    found = []
    for name, move in moves.items():
        members = {v: move[v] for v in variables if v in move}
        if name in tangled or name in variables or not members:
            continue
        scale = _whole(members.values())
        each = {v: int(x * scale) for v, x in members.items()}
        steps = {Fraction(variables[v], x) for v, x in each.items()}
        size = next(iter(steps))
        if min(each.values()) < 1 or len(steps) > 1 or size.denominator > 1:
            continue
        says = {n: move[n] * scale for n in numbers if n in move}
        found.append(Lever(next(iter(each)), int(size), each, says))
    place = {v: k for k, v in enumerate(variables)}
    return sorted(found, key=lambda lever: place[lever.name])


def _whole(values: Iterable[Fraction]) -> Fraction:
    """The factor that makes fractions the smallest whole numbers in the same proportion."""
    known = list(values)
    common = math.lcm(*(x.denominator for x in known))
    return Fraction(common, math.gcd(*(int(x * common) for x in known)))


def _reduced(rows: Iterable[Row], place: Mapping[str, int]) -> dict[str, Row]:
    """Gauss and Jordan: pivot -> its row, with one at the pivot and no other pivot in it."""
    pivots: dict[str, Row] = {}
    for given in rows:
        row = dict(given)
        for name in [n for n in row if n in pivots]:
            _subtract(row, pivots[name], row[name])
        if not row:
            continue
        pivot = min(row, key=place.__getitem__)
        row = {name: value / row[pivot] for name, value in row.items()}
        for other in pivots.values():
            if pivot in other:
                _subtract(other, row, other[pivot])
        pivots[pivot] = row
    return pivots


def _subtract(row: Row, other: Row, times: Fraction) -> None:
    for name, value in other.items():
        left = row.get(name, Fraction(0)) - times * value
        if left:
            row[name] = left
        else:
            row.pop(name, None)
