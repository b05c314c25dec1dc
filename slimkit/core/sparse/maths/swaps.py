"""Swaps: in each row a kept and a dropped weight change places, as long as the row's error falls.

For one row with target t (n,), sparse s (n,), d = t - s and c = G d (n,), the error is d G d^T. If u leaves and p comes
back, worth b, then d gains s_u at u and loses b at p:

    change(u, p) = s_u^2 G_uu + 2 s_u c_u + b^2 G_pp - 2 b (c_p + s_u G_up)

A method that refits takes the best b = (c_p + s_u G_up) / G_pp; one that only chooses takes b = t_p. The pair of the
most negative change is taken, c is brought up to date from two columns of G, and the next is looked for. All pairs
within a group of n:m are looked at; without a pattern the CANDIDATES that cost least to drop with the CANDIDATES that
gain most by coming back, each by itself. The change is exact, so no swap makes a row worse. Source: one-swaps on
the Gram matrix, SparseSwaps (2512.10922).
"""

from __future__ import annotations

from typing import Any

from slimkit.core.sparse.maths.backend import Array, device_of, namespace
from slimkit.core.sparse.maths.pattern import NM

# Of each row so many weights that may go meet as many that may come.
CANDIDATES = 16

# A swap must gain this share of the row's output power: less is rounding.
LEAST = 1e-7

# Never divide by less.
TINY = 1e-30


def swap(
    target: Array, weight: Array, keep: Array, gram: Array, nm: NM | None, most: int, refits: bool
) -> tuple[Array, Array, dict[str, Any]]:
    """Exchange kept and dropped weights of each row while that lowers its error.

    Args:
        target: (out, n) what to come close to.
        weight: (out, n) the sparse weight; it is left alone.
        keep: (out, n) its mask.
        gram: (n, n) mean of x x^T.
        nm: the n:m pattern, which stays legal, or None.
        most: swaps of a row, at most.
        refits: whether what comes back gets the best value, or its own.

    Returns:
        The weight, its mask and facts: "swaps", how many were made, "swaps_gain", the share of the error that went, and
        "swaps_error", how large it was.

    Example:
        >>> import numpy as np
        >>> gram = np.array([[1.0, 0.9], [0.9, 1.0]])
        >>> target = np.array([[1.0, 1.1]])
        >>> keep = np.array([[True, False]])
        >>> swap(target, target * keep, keep, gram, None, 5, True)[1]
        array([[False,  True]])
    """
    xp = namespace(target)
    device = device_of(target)
    weight, keep = xp.asarray(weight, copy=True), xp.asarray(keep, copy=True)
    missing = target - weight  # (out, n): d
    slope = missing @ gram  # (out, n): c
    diagonal = xp.clip(xp.linalg.diagonal(gram), TINY, None)  # (n,)
    before = xp.sum(missing * slope)
    least = LEAST * xp.sum(target * (target @ gram), axis=1)  # (out,)
    left = xp.arange(target.shape[0], device=device)  # rows in which a swap may still help
    made = 0
    for _ in range(most):
        w, k, c, t = (a[left] for a in (weight, keep, slope, target))
        out, into = _pairs(w, k, c, t, diagonal, nm, refits)  # (rows, pairs) each
        s_out, c_out, c_in = (xp.take_along_axis(a, i, axis=1) for a, i in ((w, out), (c, out), (c, into)))
        pulled = c_in + s_out * gram[out, into]
        value = pulled / diagonal[into] if refits else xp.take_along_axis(t, into, axis=1)
        change = s_out * s_out * diagonal[out] + 2 * s_out * c_out + value * (value * diagonal[into] - 2 * pulled)
        fits = xp.take_along_axis(k, out, axis=1) & ~xp.take_along_axis(k, into, axis=1)  # a row may be all kept
        change = xp.where(fits, change, xp.zeros_like(change))
        best = xp.argmin(change, axis=1)[:, None]  # (rows, 1)
        gain = xp.take_along_axis(change, best, axis=1)[:, 0] < -least[left]
        if not bool(xp.any(gain)):
            break
        left, best = left[gain], best[gain]
        u, p = (xp.take_along_axis(i[gain], best, axis=1)[:, 0] for i in (out, into))  # (rows,)
        b = xp.take_along_axis(value[gain], best, axis=1)[:, 0]
        gone = weight[left, u]
        weight[left, u], weight[left, p] = 0.0, b
        keep[left, u], keep[left, p] = False, True
        missing[left, u], missing[left, p] = target[left, u], target[left, p] - b
        slope[left] = slope[left] + gone[:, None] * gram[u] - b[:, None] * gram[p]
        made += left.shape[0]
    after = xp.sum(missing * (missing @ gram))
    gain = 1 - float(after) / float(before) if float(before) > 0 else 0.0
    return weight, keep, {"swaps": made, "swaps_gain": round(gain, 6), "swaps_error": float(before)}


def _pairs(
    w: Array, keep: Array, c: Array, target: Array, diagonal: Array, nm: NM | None, refits: bool
) -> tuple[Array, Array]:
    """Which columns may go and which may come instead, (rows, pairs) each; all pairs differ in what they are."""
    xp = namespace(w)
    rows, n = w.shape
    device = device_of(w)
    infinite = xp.asarray(float("inf"), dtype=w.dtype, device=device)
    cost = xp.where(keep, w * (w * diagonal + 2 * c), infinite)  # what the row loses if it goes alone
    alone = -c * c / diagonal if refits else target * (target * diagonal - 2 * c)
    gain = xp.where(keep, infinite, alone)  # what the row loses if it comes alone, below zero
    if nm is None:
        n_kept = xp.count_nonzero(keep, axis=1)
        most_out = max(1, min(CANDIDATES, int(xp.max(n_kept))))
        most_in = max(1, min(CANDIDATES, n - int(xp.min(n_kept))))
        out, into = _smallest(cost, most_out), _smallest(gain, most_in)
        return xp.repeat(out, into.shape[1], axis=1), xp.concat([into] * out.shape[1], axis=1)
    start = xp.arange(0, n, nm.group, device=device)[None, :, None]  # (1, groups, 1)
    grouped = (rows, n // nm.group, nm.group)
    out = _smallest(cost.reshape(-1, nm.group), nm.keep).reshape(grouped[0], grouped[1], -1) + start
    into = _smallest(gain.reshape(-1, nm.group), nm.group - nm.keep).reshape(grouped[0], grouped[1], -1) + start
    pairs = (rows, grouped[1], nm.keep, nm.group - nm.keep)
    every_out = xp.broadcast_to(out[:, :, :, None], pairs).reshape(rows, -1)
    return every_out, xp.broadcast_to(into[:, :, None, :], pairs).reshape(rows, -1)


def _smallest(values: Array, k: int) -> Array:
    """The places of the k smallest of each row."""
    xp = namespace(values)
    if hasattr(xp, "topk"):
        found: Array = xp.topk(values, k, 1, False).indices
        return found
    if hasattr(xp, "argpartition"):
        return xp.argpartition(values, k - 1, axis=1)[:, :k] if k < values.shape[1] else xp.argsort(values, axis=1)
    return xp.argsort(values, axis=1)[:, :k]
