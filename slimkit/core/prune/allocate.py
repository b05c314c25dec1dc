"""How many indices each variable keeps: a budget of parameters or multiplications, alignment and floors.

Where k (variables,) is kept, the parameters (or multiplications) are a polynomial, a product of sizes for each term:

    count(k) = constant + sum_t factor_t prod_{a of t} (offset_a + slope_a k)      slope_a (variables,)

Wanted is a k with count(k) near the target, floor <= k <= full, and k a multiple of `steps`, which keep every axis
aligned. One number t in [0, 1] leads there: all variables keep the share t, or those chunks of indices that are among
the best t of all chunks by their scores (one threshold for the whole model, as Liu et al. 2017, "Network Slimming",
section 3). t is bisected, then single steps of one variable are taken while they come nearer, alike variables first.
Where a step of one variable is more than all others can make up for, each of its few choices is tried. Exact counts
all along: the factors, offsets and slopes are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.prune.expressions import Expr, linear_form
from slimkit.core.prune.solve import View

Array = np.ndarray[Any, Any]

_COARSE = 4  # choices of a variable that are tried one by one where the target is missed


class Account:
    """Counts parameters or multiplications as a function of how many indices each variable keeps.

    Args:
        view: the coupling.
        what: "params" or "macs".

    Example:
        >>> Account.of_terms([[3, "d0"], ["d0", "d0"]], {"d0": 4}).count(np.array([4]))
        28
    """

    is_linear = True  # in each variable by itself
    _aligned: Account | None = None  # of whose axes alignment is; None: this one's

    def __init__(self, view: View, what: str = "params") -> None:
        buffers, full = view.coupling.graph.buffers, view.counts
        terms = (
            [e for p, e in view.axes.items() if p not in buffers] if what == "params" else [e for _, e in view.costs]
        )
        self._build(terms, full)

    @classmethod
    def of_terms(cls, terms: Sequence[Sequence[Expr]], full: Mapping[str, int]) -> Account:
        """An account of plain terms, each a list of axes whose sizes multiply."""
        self = cls.__new__(cls)
        self._build(terms, full)
        return self

    def _build(self, terms: Sequence[Sequence[Expr]], full: Mapping[str, int]) -> None:
        self.names = list(full)
        self._multiples: list[int] = []
        self._counted: frozenset[str] = frozenset()
        order = {name: k for k, name in enumerate(self.names)}
        forms: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {(1, ()): 0}
        rows: list[tuple[int, list[int]]] = []
        self.constant = 0
        for term in terms:
            factor, used = 1, []
            for expr in term:
                constant, slopes = linear_form(expr, order)
                if slopes:
                    used.append(forms.setdefault((constant, tuple(sorted(slopes.items()))), len(forms)))
                else:
                    factor *= constant
            if used:
                rows.append((factor, used))
            else:
                self.constant += factor
        # A count is a sum of terms, each a factor times some sizes; a size is linear in the variables' counts.
        width = max((len(used) for _, used in rows), default=1)
        self._factors = np.array([f for f, _ in rows], dtype=np.int64)  # (terms,)
        # (terms, width): the numbers of the sizes that each term multiplies
        self._used = np.array([u + [0] * (width - len(u)) for _, u in rows], dtype=np.int64).reshape(len(rows), width)
        self._offsets = np.array([c for c, _ in forms], dtype=np.int64)  # (sizes,)
        self._slopes = np.zeros((len(forms), len(order)), dtype=np.int64)  # (sizes, variables)
        for place, (_, pairs) in enumerate(forms):
            for variable, slope in pairs:
                self._slopes[place, variable] = slope

    def joined(
        self,
        names: Sequence[str],
        offsets: Array,
        matrix: Array,
        multiples: Sequence[int],
        counted: Collection[str] = (),
    ) -> Account:
        """The same number as a function of levers: counts = offsets + matrix @ steps (`lever_matrix`).

        Args:
            names: the levers'.
            offsets: (variables,) counts where all levers stand at zero.
            matrix: (variables, levers) indices a step.
            multiples: a number each that kept steps are multiples of; sizes that are asked about are, too.
            counted: levers that are no widths (experts), which no alignment is asked of.
        """
        new = copy(self)
        new.names = list(names)
        new._offsets = self._offsets + self._slopes @ offsets  # (sizes,) + (sizes, variables) @ (variables,)
        new._slopes = self._slopes @ matrix  # (sizes, variables) @ (variables, levers)
        new._multiples, new._counted = list(multiples), frozenset(counted)
        if self._aligned is not None:
            new._aligned = self._aligned.joined(names, offsets, matrix, multiples, counted)
        return new

    def count(self, counts: Array) -> int:
        """The number for these counts, exactly."""
        sizes = self._offsets + self._slopes @ counts  # (sizes,) + (sizes, variables) @ (variables,)
        products = sizes[self._used].prod(axis=1)  # (terms, width) -> (terms,)
        return int((self._factors * products).sum()) + self.constant

    def steps(self, alignment: int, sizes: Array) -> Array:
        """The smallest change of each variable that keeps all its axes aligned.

        An axis that is no multiple of the alignment itself keeps its own largest common step. One that is narrower than
        the alignment (channels of one group, heads in a table) does not count beside a wider one of the same variable.
        """
        if self._aligned is not None:
            return self._aligned.steps(alignment, sizes)
        steps = np.ones(len(self.names), dtype=np.int64)
        for variable in range(len(self.names)):
            slopes = {int(s) for s in self._slopes[:, variable]} - {0}
            wide = {s for s in slopes if s * int(sizes[variable]) >= alignment}
            for slope in () if self.names[variable] in self._counted else wide or slopes:
                common = math.gcd(alignment, slope * int(sizes[variable]))
                steps[variable] = math.lcm(int(steps[variable]), common // math.gcd(common, slope))
        for variable, must in enumerate(self._multiples):
            both, size = math.lcm(int(steps[variable]), must), int(sizes[variable])
            # Where the width has no room for both, what devices must divide goes before alignment.
            steps[variable] = both if size % both == 0 else must * max(1, math.gcd(both, size) // must)
        return steps

    def floors(self, sizes: Sequence[int] | Array, floor_ratio: float, alignment: int) -> Array:
        """The least that each variable keeps: its share, rounded up to a step."""
        full = np.asarray(sizes, dtype=np.int64)  # (variables,), as all below
        steps = self.steps(alignment, full)
        least = -(-np.ceil(full * floor_ratio - 1e-9).astype(np.int64) // steps) * steps
        return np.minimum(full, np.maximum(least, steps))

    def floor_for(
        self,
        sizes: Sequence[int] | Array,
        floor_ratio: float,
        alignment: int,
        target: float,
        fixed: Mapping[int, int] | None = None,
    ) -> float:
        """A least share, or as much less of one as the target needs; `fixed`: place of a variable -> what it keeps."""

        def reaches(share: float) -> bool:
            least = self.floors(sizes, share, alignment)
            for place, number in (fixed or {}).items():
                least[place] = number
            return self.count(least) <= target

        if not len(sizes) or reaches(floor_ratio):
            return floor_ratio
        low, high = 0.0, floor_ratio
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if reaches(middle) else (low, middle)
        return low


def aligned_places(
    account: Account, places: Mapping[str, Sequence[int]], sizes: Sequence[int], alignment: int
) -> dict[str, list[int]]:
    """Of the numbers that some variables may keep alone those that alignment allows."""
    steps = dict(zip(account.names, account.steps(alignment, np.asarray(sizes, dtype=np.int64)).tolist()))
    return {n: [k for k in some if k % steps[n] == 0 or k == some[-1]] for n, some in places.items() if n in steps}


def least_places(account: Account, floors: Array, places: Mapping[str, Sequence[int]]) -> Array:
    """The least that each variable keeps, of those places at which some of them may stand alone."""
    return np.array(
        [min((k for k in places.get(n, ()) if k >= f), default=f) for n, f in zip(account.names, floors.tolist())],
        dtype=np.int64,
    )


@dataclass
class Allocation:
    """How many indices each variable keeps.

    Args:
        keep: variable -> number.
        total: parameters (or multiplications) left.
        target: what was asked for.
        held_back: variables at their floor while the target is not reached.
    """

    keep: dict[str, int]
    total: int
    target: float
    held_back: list[str]


def allocate(
    account: Account,
    sizes: Sequence[int],
    target: float,
    floor_ratio: float,
    alignment: int,
    chunks: Mapping[str, Array] | None = None,
    alike: Sequence[Any] | None = None,
    tolerance: float = 0.005,
    level: bool = False,
    gives_way: bool = False,
    most: Sequence[int] | None = None,
) -> Allocation:
    """Choose kept counts so that the account comes as near to the target as the steps allow.

    Args:
        account: what is counted.
        sizes: indices of each variable, in the account's order.
        target: the number to reach.
        floor_ratio: least share of its indices that a variable keeps.
        alignment: kept widths are multiples of it.
        chunks: variable -> scores of its indices, ascending: drop the globally least instead of the same share
            everywhere.
        alike: a label each; equally labelled variables change together where that reaches the target.
        tolerance: relative distance from the target at which to stop improving.
        level: equally labelled variables keep equal numbers, whatever that costs.
        gives_way: the floors may be lowered where the target is not reached otherwise.
        most: the most that each variable may keep, where that is not all.

    Returns:
        The counts.
    """
    full = np.asarray(sizes, dtype=np.int64)
    ceilings = full if most is None else np.asarray(most, dtype=np.int64)
    steps = account.steps(alignment, full)
    floors = np.minimum(account.floors(sizes, floor_ratio, alignment), ceilings)
    if not len(full) or account.count(ceilings) <= target:
        return Allocation(dict(zip(account.names, ceilings.tolist())), account.count(ceilings), target, [])
    if account.count(floors) >= target:
        counts = floors
    else:
        rank = _by_share(full, steps) if chunks is None or level else _by_score(account.names, full, steps, chunks)
        together = _together(full, alike)

        def near(least: Array, most: Array) -> Array:
            counts = _search(account, rank, least, most, target)
            return _improve(account, counts, least, most, steps, target, tolerance, together, level)

        counts = near(floors, ceilings)
        bounds = _with_coarse_fixed(account, counts, full, target, floor_ratio, alignment, together, gives_way)
        for low, high in bounds if _misses(account, counts, full, target) else ():
            if (low > ceilings).any():
                continue
            other = near(low, np.minimum(high, ceilings))
            if not _misses(account, other, full, target):
                counts = other
                break
    held = [n for n, k, f in zip(account.names, counts, floors) if k == f]
    total = account.count(counts)
    return Allocation(
        dict(zip(account.names, counts.tolist())), total, target, held if total > target * (1 + tolerance) else []
    )


def _by_share(full: Array, steps: Array) -> Any:
    """Counts as a function of t in [0, 1]: the share of each variable that stays."""
    return lambda t: np.rint(full * t / steps).astype(np.int64) * steps  # (variables,)


def _by_score(names: Sequence[str], full: Array, steps: Array, chunks: Mapping[str, Array]) -> Any:
    """Counts as a function of t in [0, 1]: t is the share of all chunks of indices that stays, best scores first."""
    # of each variable (indices,) -> (steps, indices a step) -> (steps,)
    means = [np.asarray(chunks[n], dtype=np.float64).reshape(-1, int(s)).mean(axis=1) for n, s in zip(names, steps)]
    order = np.sort(np.concatenate(means))  # (steps of all variables,)

    def at(t: float) -> Array:
        if t >= 1:
            return full
        least = order[min(int((1 - t) * len(order)), len(order) - 1)]  # the one threshold
        return np.array([int((m >= least).sum()) for m in means], dtype=np.int64) * steps

    return at


def _search(account: Account, rank: Any, floors: Array, full: Array, target: float) -> Array:
    low, high = 0.0, 1.0
    best = full
    for _ in range(24):
        middle = (low + high) / 2
        counts = np.clip(rank(middle), floors, full)
        total = account.count(counts)
        if abs(total - target) < abs(account.count(best) - target):
            best = counts
        if total > target:
            high = middle
        else:
            low = middle
    return best


def _together(full: Array, alike: Sequence[Any] | None) -> list[Array]:
    """The places of equally labelled variables."""
    labels = list(alike) if alike is not None else list(range(len(full)))
    return [np.flatnonzero([x == label for x in labels]) for label in dict.fromkeys(labels)]


def _misses(account: Account, counts: Array, full: Array, target: float) -> bool:
    """Whether the counts are more than two points away from the target."""
    return abs(account.count(counts) - target) > 0.02 * account.count(full)


def _with_coarse_fixed(
    account: Account,
    counts: Array,
    full: Array,
    target: float,
    floor_ratio: float,
    alignment: int,
    together: Sequence[Array],
    gives_way: bool,
) -> Iterator[tuple[Array, Array]]:
    """Bounds in which one variable of few choices stands at one of them: a step of it is more than all others can make
    up for one step at a time. It moves as little from `counts` as may be; the others' floors give way as far as the
    target needs, if they may."""
    steps, floors = account.steps(alignment, full), account.floors(full, floor_ratio, alignment)
    for group in together:
        place = group[0]
        choices = range(int(floors[place]), int(full[place]) + 1, int(steps[place]))
        near = sorted(choices, key=lambda choice: abs(choice - int(counts[place])))
        for choice in near if 1 < len(near) <= _COARSE else ():
            fixed = dict.fromkeys(group.tolist(), choice)
            share = account.floor_for(full, floor_ratio, alignment, target, fixed) if gives_way else floor_ratio
            least, most = account.floors(full, share, alignment), full.copy()
            least[group] = most[group] = choice
            yield least, most


def _improve(
    account: Account,
    counts: Array,
    floors: Array,
    full: Array,
    steps: Array,
    target: float,
    tolerance: float,
    together: Sequence[Array],
    level: bool,
) -> Array:
    """Move single variables (groups of alike ones first) by one step while that comes nearer to the target."""
    # Blocks that are alike stay alike unless that alone misses the target by more than a point.
    single = [np.array([k]) for k in range(len(full))]
    for moves, near in ((together, tolerance), (single, max(tolerance, 0.01 * account.count(full) / target)))[
        : 2 - level
    ]:
        for _ in range(200):
            away = account.count(counts) - target
            if abs(away) <= near * target:
                return counts
            sign = -1 if away > 0 else 1
            best, best_away = None, abs(away)
            for move in moves:
                trial = counts.copy()
                trial[move] += sign * steps[move]
                if (trial[move] < floors[move]).any() or (trial[move] > full[move]).any():
                    continue
                distance = abs(account.count(trial) - target)
                if distance < best_away:
                    best, best_away = trial, distance
            if best is None:
                break
            counts = best
    return counts
