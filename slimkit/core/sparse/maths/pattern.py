"""Which entries stay: exact counts over scores, and n:m groups, with ties broken the same way everywhere.

    keep all but k     limit = the k-th smallest score; what is above it stays, and of what equals it the last ones
    keep n of m        of every m neighbours in a row the n largest; of equal ones the later stay

`plain.keep_all_but` and `plain.keep_nm` say the same by sorting, and the tests hold these to them. Three short cuts
pay for themselves, each with its figure beside it: a sorted sample instead of a selection over all (`_keep_of_long`),
columns instead of a transposed copy (`keep_nm`), and integers of which no two are equal (`TwoOfFour`). Source of n:m:
Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch".
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from slimkit.core import check
from slimkit.core.sparse.maths.backend import Array, bits, device_of, kth_smallest, library, like, namespace, to_numpy

# More scores than this are searched for a limit by way of a sorted sample of so many.
LONG = 1 << 15
SAMPLE = 1 << 13

# Groups of an n:m pattern that are turned and compared while they lie in the processor's cache.
NEAR = 1 << 16


class NM(NamedTuple):
    """Of every `group` consecutive input channels `keep` stay.

    Example:
        >>> NM(2, 4).ratio
        0.5
    """

    keep: int
    group: int

    @property
    def ratio(self) -> float:
        """Share of the weights that become zero."""
        return 1 - self.keep / self.group


def parse(text: Any, name: str = "pattern") -> NM:
    """Read "n:m" (n of every m stay) or Ascend's "m:n" spelling of the same.

    Example:
        >>> parse("2:4") == parse("4:2")
        True
    """
    found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", check.text(text, name))
    low, high = sorted(map(int, found.groups())) if found else (0, 0)
    if not 0 < low < high:
        check.wrong_value(name, 'None or "n:m" with n < m, such as "2:4" or "4:8"', text)
    return NM(low, high)


def zeros_between(ratio: float, start: int, stop: int) -> int:
    """How many of the entries start..stop of a long row become zero, so that all pieces add up to the exact total.

    Example:
        >>> [zeros_between(0.5, 0, 9), zeros_between(0.5, 9, 18)]
        [4, 5]
    """
    return round(ratio * stop) - round(ratio * start)


def comparable(scores: Array) -> Array:
    """Scores at the resolution at which they are compared, float32: of those that are equal there the index decides.

    Where scores are float64, what two libraries or two orders of a sum make differ is far below that, so that weights
    of equal importance (twins, weights on a coarse grid) are told apart by their place and not by rounding. Scores that
    are float32 themselves are compared as they are: coarser steps only move the limit at which rounding decides.
    """
    xp = namespace(scores)
    return xp.astype(scores, xp.float32, copy=False)


def keep_all_but(scores: Array, n_zeros: int) -> Array:
    """Keep all but the `n_zeros` smallest scores of an array; of equal scores the first go.

    Args:
        scores: array of any shape, larger is more important.
        n_zeros: exact number of entries to drop.

    Returns:
        Boolean array of the same shape, True where the entry stays.
    """
    values = scores.reshape(-1)  # (entries,)
    # On the CPU numpy compares and counts several times as fast as torch.
    if len(values) > LONG and 0 < n_zeros < len(values) and str(device_of(scores)) == "cpu":
        return like(_keep_of_long(to_numpy(values), n_zeros), scores).reshape(scores.shape)
    return keep_all_but_rows(values[None], n_zeros).reshape(scores.shape)


def _keep_of_long(values: np.ndarray[Any, Any], n_zeros: int) -> np.ndarray[Any, Any]:
    """The same for many values: a sorted sample tells between which two the limit lies, so that few are looked at.

    The count of what lies below makes it exact; where the sample was wrong, all are looked at. Of 128 x 1024 scores, a
    block of the sweep, it takes .4 ms where torch's k-th value takes 2.1.
    """
    sample = np.sort(values[:: len(values) // SAMPLE | 1])  # about (SAMPLE,)
    place, margin = n_zeros * len(sample) // len(values), int(2.5 * len(sample) ** 0.5)
    low = sample[place - margin] if place >= margin else -np.inf
    high = sample[place + margin] if place + margin < len(sample) else np.inf
    near = values[np.flatnonzero((values >= low) & (values <= high))]
    rank = n_zeros - int(np.count_nonzero(values < low))
    if not 0 < rank <= len(near):
        near, rank = values, n_zeros
    limit = np.partition(near, rank - 1)[rank - 1]
    keep: np.ndarray[Any, Any] = values > limit
    spare = len(values) - n_zeros - int(np.count_nonzero(keep))
    if spare:
        keep[np.flatnonzero(values == limit)[-spare:]] = True
    return keep


def keep_all_but_rows(scores: Array, n_zeros: int) -> Array:
    """Keep all but the `n_zeros` smallest scores of each row; of equal scores the first go."""
    xp = namespace(scores)
    if n_zeros <= 0:
        return xp.ones(scores.shape, dtype=xp.bool, device=device_of(scores))
    if n_zeros >= scores.shape[1]:
        return xp.zeros(scores.shape, dtype=xp.bool, device=device_of(scores))
    return _break_ties(scores, kth_smallest(scores, n_zeros), n_zeros)  # the limit is (rows, 1)


def keep_across_rows(scores: Array, n_zeros: int) -> Array:
    """Keep all but `n_zeros` of the smallest scores, as many in each row; the rest where it costs least.

    Where the rows do not share evenly, one more goes in those rows whose next score is smallest.

    Args:
        scores: (rows, columns), larger is more important.
        n_zeros: exact number of entries to drop.

    Returns:
        Boolean array of the same shape, True where the entry stays.
    """
    base, extra = divmod(n_zeros, scores.shape[0])
    keep = keep_all_but_rows(scores, base)  # (rows, columns)
    if extra:
        next_score = kth_smallest(scores, base + 1)[:, 0]  # (rows,)
        more = ~keep_all_but(next_score, extra)  # (rows,)
        keep[more] = keep_all_but_rows(scores[more], base + 1)
    return keep


def _break_ties(scores: Array, limit: Array, n_zeros: Any) -> Array:
    """Keep what is above the limit (rows, 1), and of what equals it the last ones, so that each count is exact."""
    xp = namespace(scores)
    keep = scores > limit
    spare = (scores.shape[1] - n_zeros) - xp.count_nonzero(keep, axis=1)[:, None]
    if bool(xp.any(spare > 0)):
        tie = scores == limit
        # (rows, columns): equal scores of a row counted from its start
        place = xp.cumulative_sum(xp.astype(tie, xp.int64), axis=1)
        total = xp.sum(xp.astype(tie, xp.int64), axis=1, keepdims=True)
        keep = keep | (tie & (place > total - spare))
    return keep


def keep_nm(scores: Array, nm: NM) -> Array:
    """Keep the `nm.keep` largest of every `nm.group` consecutive entries of the last axis.

    Args:
        scores: (rows, columns), columns a multiple of the group.
        nm: the pattern.

    Returns:
        Boolean array of the same shape.
    """
    xp = namespace(scores)
    groups = scores.reshape(-1, nm.group)  # (rows * columns / m, m)
    keep = xp.empty(groups.shape, dtype=xp.bool, device=device_of(scores))
    for start in range(0, groups.shape[0], NEAR):
        some, kept = groups[start : start + NEAR], keep[start : start + NEAR]
        columns = xp.empty((nm.group, some.shape[0]), dtype=scores.dtype, device=device_of(scores))  # (m, groups)
        for j in range(nm.group):  # several times as fast as turning the matrix
            columns[j] = some[:, j]
        found = keep_nm_columns(columns, nm)
        for j in range(nm.group):
            kept[:, j] = found[j]
    return keep.reshape(scores.shape)


def keep_nm_columns(scores: Array, nm: NM) -> Array:
    """Keep the `nm.keep` largest of each column of (group, columns)."""
    if nm == (2, 4):
        choice = TwoOfFour(scores)
        return choice.keys(scores) >= choice.second
    return keep_all_but_rows(scores.T, nm.group - nm.keep).T  # (columns, group), and back


class TwoOfFour:
    """The two largest of each column of (4, columns), with room for the work; of equal scores the later wins.

    Scores become integers of the same order, whose last two bits are the place, so that no two are equal; scores
    that differ by less than four units in the last place count as equal. Two comparisons of pairs then find the second
    largest: 3.7 ms for 1024 x 1024 where the general choice takes 18.

    Args:
        model: an array like the scores that will come.

    Attributes:
        second: (columns,) the lesser of the two largest keys.
    """

    def __init__(self, model: Array) -> None:
        self._lib = library(model)
        like_bits = bits(model)
        self._places = namespace(model).arange(4, dtype=like_bits.dtype, device=device_of(model))[:, None]
        self._high, self._low = self._lib.empty_like(like_bits[:2]), self._lib.empty_like(like_bits[:2])
        self._pairs = self._high[0], self._high[1], self._low[0], self._low[1]
        self.second = self._low[0]

    def keys(self, scores: Array) -> Array:
        """The scores as integers, in the memory of the scores; sets `second`."""
        lib, keys = self._lib, bits(scores)  # (4, columns): a non-negative float's bits are in its own order
        keys &= -4
        keys |= self._places
        lib.maximum(keys[:2], keys[2:], out=self._high)  # (2, columns): the winners of 0 against 2 and 1 against 3
        lib.minimum(keys[:2], keys[2:], out=self._low)  # (2, columns): the losers
        high, other, low, another = self._pairs  # (columns,) each
        lib.minimum(high, other, out=high)  # the lesser winner, or
        lib.maximum(low, another, out=low)  # the better loser
        lib.maximum(high, low, out=low)  # is the second of all four
        return keys


def keep_by_row(scores: Array, n_zeros: Array) -> Array:
    """Keep all but the smallest scores of each row, as many as `n_zeros` (rows, 1) says for it."""
    xp = namespace(scores)
    if bool(xp.all(n_zeros == n_zeros[0, 0])):
        return keep_all_but_rows(scores, int(n_zeros[0, 0]))
    ordered = xp.sort(scores, axis=1)  # (rows, columns)
    limit = xp.take_along_axis(ordered, xp.clip(n_zeros - 1, 0, None), axis=1)
    return _break_ties(scores, limit, n_zeros)
