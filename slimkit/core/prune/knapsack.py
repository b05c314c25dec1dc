"""How many indices each variable keeps where the loss of every choice is known: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.prune.allocate import Account, Allocation, least_places

Array = np.ndarray[Any, Any]

# Choices of one variable at least, and of all together where few variables stand for many layers: coarser ones would
# miss the target by a step of all those layers.
_LEVELS, _ALL_LEVELS = 48, 2880
_ROUNDS = 8


def measured(
    account: Account,
    sizes: Sequence[int],
    target: float,
    floor_ratio: float,
    alignment: int,
    losses: Mapping[str, Array],
    alike: Sequence[Any] | None,
    most: Sequence[int] | None = None,
    places: Mapping[str, Sequence[int]] | None = None,
) -> Allocation:
    """Choose kept counts of least loss.

    Args:
        account: what is counted.
        sizes: indices of each variable, in the account's order.
        target: the number not to exceed.
        floor_ratio: least share of its indices that a variable keeps.
        alignment: kept widths are multiples of it.
        losses: variable -> loss at which each of its indices goes; a variable without any keeps all it has.
        alike: a label each; equally labelled variables keep equal numbers. None: each its own.
        most: the most that each variable may keep, where that is not all.
        places: variable -> the only numbers that it may keep, all it has among them.

    Returns:
        The counts.
    """
    full = np.asarray(sizes, dtype=np.int64)
    ceilings = full if most is None else np.asarray(most, dtype=np.int64)
    floors = np.where([n in losses for n in account.names], account.floors(sizes, floor_ratio, alignment), full)
    floors = np.minimum(least_places(account, floors, places or {}), ceilings)
    labels = list(alike) if alike is not None else list(range(len(full)))
    together = [np.flatnonzero([x == label for x in labels]) for label in dict.fromkeys(labels)]
    counts = ceilings
    if len(full) and account.count(ceilings) > target:
        steps = account.steps(alignment, full)
        counts = cheapest(account, full, floors, steps, target, losses, together, ceilings, places or {})
    held = [n for n, k, f in zip(account.names, counts, floors) if k == f]
    total = account.count(counts)
    return Allocation(dict(zip(account.names, counts.tolist())), total, target, held if total > target * 1.005 else [])


def cheapest(
    account: Account,
    full: Array,
    floors: Array,
    steps: Array,
    target: float,
    losses: Mapping[str, Array],
    together: Sequence[Array],
    ceilings: Array,
    places: Mapping[str, Sequence[int]],
) -> Array:
    """The counts of least loss whose account is no more than the target.

    Minimises the sum of the variables' losses over one choice each, by HiGHS (`scipy.optimize.milp`). The account is
    linear in each variable, or the cost of each choice is asked for (a table of times); where two multiply one another
    (the channels between two convolutions) it is taken as a sum around the last answer, and solved again. Where no
    answer keeps to the target, every variable goes down to one common loss.

    Args:
        account: what is counted.
        full: (n,) indices of each variable, in the account's order.
        floors: (n,) the least that each keeps; full for those without losses.
        steps: (n,) kept numbers are multiples of these, or full.
        target: the number not to exceed.
        losses: variable -> loss at which each of its indices goes, as `eliminate` gives them.
        together: places of variables that keep equal numbers.
        ceilings: (n,) the most that each keeps.
        places: variable -> the only numbers that it may keep.

    Returns:
        (n,) counts; the floors where even these exceed the target.
    """
    known = np.array([name in losses for name in account.names], dtype=bool)
    if account.count(floors) >= target:
        return floors
    groups = [g[known[g]] for g in together if known[g].any()]
    levels = max(_LEVELS, _ALL_LEVELS // max(1, len(groups)))
    choices = [
        _choices(int(ceilings[g[0]]), int(floors[g[0]]), int(steps[g[0]]), levels, places.get(account.names[g[0]]))
        for g in groups
    ]
    prices: list[Array] = []
    for group, numbers in zip(groups, choices):
        rising = [np.concatenate([[0.0], np.sort(losses[account.names[k]])]) for k in group]
        prices.append(np.sum([[r[full[group[0]] - n] for n in numbers] for r in rising], axis=0))
    around, asked = ceilings, target
    best: Array | None = None
    for _ in range(_ROUNDS):
        found = _solve(account, around, ceilings, groups, choices, prices, asked)
        if found is None:
            break
        over = account.count(found) - target
        if over <= 0 and (best is None or _loss(found, groups, choices, prices) < _loss(best, groups, choices, prices)):
            best = found
        if (found == around).all():
            break
        # What was taken for linear was not: ask for as much less as it missed by.
        around, asked = found, asked - max(over, 0)
    return _levelled(account, ceilings, groups, choices, prices, target) if best is None else best


def _levelled(
    account: Account,
    ceilings: Array,
    groups: Sequence[Array],
    choices: Sequence[list[int]],
    prices: Sequence[Array],
    target: float,
) -> Array:
    """The counts within the target of which no variable has lost more than one common loss, as low as may be."""
    every = np.unique(np.concatenate(prices))

    def at(loss: float) -> Array:
        counts = ceilings.copy()
        for group, numbers, price in zip(groups, choices, prices):
            counts[group] = min(n for n, p in zip(numbers, price) if p <= max(loss, price.min()))
        return counts

    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if account.count(at(every[middle])) <= target else (middle + 1, high)
    return at(every[low])


def foretold(full: Mapping[str, int], keep: Mapping[str, int], losses: Mapping[str, Array]) -> float | None:
    """The loss that a cut is foretold to cost, one width by itself; None where that of a width is unknown.

    Example:
        >>> foretold({"d0": 3, "d1": 2}, {"d0": 1, "d1": 2}, {"d0": np.array([4.0, 1.0, 2.0])})
        2.0
    """
    cut = [name for name, number in keep.items() if number < full[name]]
    if any(name not in losses for name in cut):
        return None
    return float(sum(np.sort(losses[name])[full[name] - keep[name] - 1] for name in cut))


def _choices(most: int, floor: int, step: int, levels: int, places: Sequence[int] | None) -> list[int]:
    numbers = sorted({*range(-(-floor // step) * step, most, step), floor, most})
    if places is not None:
        numbers = [n for n in numbers if n in places or n in (floor, most)]
    if len(numbers) > levels:
        numbers = sorted({numbers[k] for k in np.linspace(0, len(numbers) - 1, levels).round().astype(int)})
    return numbers


def _loss(counts: Array, groups: Sequence[Array], choices: Sequence[list[int]], prices: Sequence[Array]) -> float:
    return float(sum(p[c.index(int(counts[g[0]]))] for g, c, p in zip(groups, choices, prices)))


def _solve(
    account: Account,
    around: Array,
    full: Array,
    groups: Sequence[Array],
    choices: Sequence[list[int]],
    prices: Sequence[Array],
    target: float,
) -> Array | None:
    """One knapsack with the account as it is around some counts; None where nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    base = account.count(around)
    number = [len(c) for c in choices]
    starts = np.concatenate([[0], np.cumsum(number)])

    def moved(group: Array, number: int) -> int:
        there = around.copy()
        there[group] = number
        return account.count(there)

    if account.is_linear:
        slopes = [base - moved(g, int(around[g[0]]) - 1) for g in groups]
        costs = np.concatenate([s * np.array(c, dtype=np.float64) for s, c in zip(slopes, choices)])
        free = target - (base - sum(s * int(around[g[0]]) for s, g in zip(slopes, groups)))
    else:
        costs = np.concatenate([[float(moved(g, n) - base) for n in c] for g, c in zip(groups, choices)])
        free = target - base
    scale = max(abs(free), 1.0)
    rows = np.repeat(np.arange(len(groups)), number)
    one = csr_array((np.ones(starts[-1]), (rows, np.arange(starts[-1]))), shape=(len(groups), starts[-1]))
    found = milp(
        np.concatenate(prices) / max(float(np.max(np.concatenate(prices))), 1e-300),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs[None] / scale, -np.inf, free / scale)],
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    if found.x is None:
        return None
    counts = full.copy()
    for k, group in enumerate(groups):
        part = found.x[starts[k] : starts[k + 1]]
        counts[group] = choices[k][int(np.argmax(part))]
    return counts
