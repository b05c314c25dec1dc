"""Which entries stay: exact counts over scores, and n:m groups, with ties broken the same way everywhere."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from slimkit.core import check
from slimkit.core.sparse.backend import Array, device_of, kth_smallest, namespace


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


def keep_all_but(scores: Array, n_zeros: int) -> Array:
    """Keep all but the `n_zeros` smallest scores of an array; of equal scores the first go.

    Args:
        scores: array of any shape, larger is more important.
        n_zeros: exact number of entries to drop.

    Returns:
        Boolean array of the same shape, True where the entry stays.
    """
    return keep_all_but_rows(scores.reshape(1, -1), n_zeros).reshape(scores.shape)


def keep_all_but_rows(scores: Array, n_zeros: int) -> Array:
    """Keep all but the `n_zeros` smallest scores of each row; of equal scores the first go."""
    xp = namespace(scores)
    if n_zeros <= 0:
        return xp.ones(scores.shape, dtype=xp.bool, device=device_of(scores))
    if n_zeros >= scores.shape[1]:
        return xp.zeros(scores.shape, dtype=xp.bool, device=device_of(scores))
    return _break_ties(scores, kth_smallest(scores, n_zeros), n_zeros)


def _break_ties(scores: Array, limit: Array, n_zeros: Any) -> Array:
    """Keep what is above the limit (rows, 1), and of what equals it the last ones, so that each count is exact."""
    xp = namespace(scores)
    keep = scores > limit
    spare = (scores.shape[1] - n_zeros) - xp.sum(xp.astype(keep, xp.int64), axis=1, keepdims=True)
    if bool(xp.any(spare > 0)):
        tie = scores == limit
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
    columns = scores.reshape(-1, nm.group).T
    return keep_nm_columns(columns, nm).T.reshape(scores.shape)


def keep_nm_columns(scores: Array, nm: NM) -> Array:
    """Keep the `nm.keep` largest of each column of (group, columns); of equal scores the later wins."""
    xp = namespace(scores)
    beaten = [0] * nm.group
    for i in range(nm.group):
        for j in range(i + 1, nm.group):
            win = xp.astype(scores[j] >= scores[i], xp.int8)  # one comparison tells both
            beaten[i] = beaten[i] + win
            beaten[j] = beaten[j] - win
    # Entry j was compared with j earlier ones, each of which beats it unless it won.
    return xp.stack([count < nm.keep - j for j, count in enumerate(beaten)])


def keep_by_row(scores: Array, n_zeros: Array) -> Array:
    """Keep all but the smallest scores of each row, as many as `n_zeros` (rows, 1) says for it."""
    xp = namespace(scores)
    if bool(xp.all(n_zeros == n_zeros[0, 0])):
        return keep_all_but_rows(scores, int(n_zeros[0, 0]))
    ordered = xp.sort(scores, axis=1)
    limit = xp.take_along_axis(ordered, xp.clip(n_zeros - 1, 0, None), axis=1)
    return _break_ties(scores, limit, n_zeros)
