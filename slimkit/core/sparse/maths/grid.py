"""Kept weights on a coarse grid, by coordinate descent: what one weight's rounding costs, the others make up for.

    minimise tr((S - Q) G (S - Q)^T)   over Q (out, n), zero where S (out, n) is, every entry a value of the grid

In column j, with all others held, a row's error is a parabola in its entry, lowest at q_j + c_j / G_jj, where
c = (S - Q) G (out, n) is minus half the slope; the grid's nearest value to that place is the best one. One column after
another, all rows at once, a few times over: from the second pass on no step makes a row worse. Source: QuantEase
(Behdin et al. 2023, section 3). What the method found, S, is the aim and not the dense weight: methods that shrink
their moments have said already how far the sample is to be followed.

Two grids. Floating point with few bits of mantissa: sign * 2^e * (1 + k / 2^bits), k = 0 .. 2^bits - 1; of a float16
its high byte then holds everything, so that a codec has half the bytes to store. And whole numbers: s * k with
k = -m .. m, m = 2^(bits - 1) - 1, and s = max |w| / m for each row (an output channel); the largest weight stays where
it is, so that the rows themselves say their s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from slimkit.core.sparse.maths.backend import Array, namespace, row_products

# Passes over the columns.
PASSES = 4

# Columns whose slopes are brought up to date together.
BLOCK = 128

# Never divide by less.
TINY = 1e-30


class Grid(Protocol):
    """The values that a weight may have."""

    def nearest(self, values: Array) -> Array:
        """The nearest legal values of a matrix (out, n) or of a column (out,)."""

    def pinned(self, weight: Array) -> Array | None:
        """(out, n) entries that stay as they are, or None."""

    def facts(self) -> dict[str, Any]:
        """What the layer's row of the report says of it."""


@dataclass(frozen=True)
class FloatGrid:
    """Floats with so many bits of mantissa, the leading one apart.

    Example:
        >>> import numpy as np
        >>> FloatGrid(2).nearest(np.array([1.0, 1.1, 1.2, -0.3, 0.0]))
        array([ 1.    ,  1.    ,  1.25  , -0.3125,  0.    ])
    """

    bits: int

    def nearest(self, values: Array) -> Array:
        xp = namespace(values)
        size = xp.abs(values)
        # Where the logarithm rounds up to a power of two, that power is the nearest value on either step.
        step = 2.0 ** (xp.floor(xp.log2(xp.clip(size, TINY, None))) - self.bits)
        return xp.where(size > TINY, xp.round(values / step) * step, 0.0)

    def pinned(self, weight: Array) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"mantissa_bits": self.bits}


@dataclass(frozen=True)
class IntegerGrid:
    """Whole multiples of one step a row.

    Args:
        step: (out, 1), as `steps_of` finds it.
        bits: of the whole numbers, the sign among them.

    Example:
        >>> import numpy as np
        >>> weight = np.array([[1.27, 0.404, 0.0]])
        >>> IntegerGrid(steps_of(weight, 8), 8).nearest(weight)
        array([[1.27, 0.4 , 0.  ]])
    """

    step: Array
    bits: int

    def nearest(self, values: Array) -> Array:
        xp = namespace(values)
        step, most = self.step if values.ndim == 2 else self.step[:, 0], 2 ** (self.bits - 1) - 1
        limit = float(most)  # array-api-compat 1.9 clips numbers of another type by no int
        return xp.clip(xp.round(values / step), -limit, limit) * step

    def pinned(self, weight: Array) -> Array:
        xp = namespace(weight)
        size = xp.abs(weight)
        return size == xp.max(size, axis=1, keepdims=True)

    def facts(self) -> dict[str, Any]:
        return {"weight_bits": self.bits}


def steps_of(weight: Array, bits: int) -> Array:
    """The step of each row, (out, 1): its largest weight is the largest whole number. 1 where a row is zero."""
    xp = namespace(weight)
    most = xp.max(xp.abs(weight), axis=1, keepdims=True)  # (out, 1)
    return xp.where(most > 0, most, 1.0) / (2 ** (bits - 1) - 1)


def on_grid(
    weight: Array, keep: Array, gram: Array | None, grid: Grid, outliers: int = 0
) -> tuple[Array, Array, dict[str, Any]]:
    """Put kept weights on the grid, in a copy.

    Args:
        weight: (out, n) the sparse weight.
        keep: (out, n) its mask.
        gram: (n, n) mean of x x^T, damped; None: each weight goes to its nearest value.
        grid: the legal values.
        outliers: so many kept weights may have any value: those whose rounding would cost most.

    Returns:
        The weight; its mask without what the grid has made zero; and facts: the grid's, "outliers", how many,
        "rounded_to_zero", how many are zero that the mask kept, "rounding_gain", the share of the error of plain
        rounding that went, and "rounding_error", how large that was.

    Example:
        >>> import numpy as np
        >>> weight, keep = np.array([[1.1, 1.1]]), np.array([[True, True]])
        >>> on_grid(weight, keep, np.array([[1.0, 0.9], [0.9, 1.0]]), FloatGrid(2))[0]
        array([[1.  , 1.25]])
    """
    xp = namespace(weight)
    rounded = grid.nearest(weight)
    cost = (weight - rounded) ** 2  # (out, n)
    if gram is not None:
        cost *= xp.linalg.diagonal(gram)
    n_free = min(outliers, int(xp.count_nonzero(keep)))
    free = xp.zeros_like(keep)
    if n_free:
        order = xp.argsort(xp.where(keep, cost, -1.0).reshape(-1))
        flat = free.reshape(-1)
        flat[order[-n_free:]] = True
        free = flat.reshape(keep.shape)
    plain = xp.where(free, weight, rounded)  # zero off the mask, as the weight is
    facts = grid.facts() | {"outliers": n_free}
    found = plain
    if gram is not None:
        found = _descend(weight, keep, free, gram, grid)
        before, after = (_errors(weight, q, gram) for q in (plain, found))  # (out, 1) each
        found = xp.where(after <= before, found, plain)
        least, total = (float(xp.sum(xp.minimum(after, before))), float(xp.sum(before)))
        facts |= {"rounding_gain": round(1 - least / total, 6) if total > 0 else 0.0, "rounding_error": total}
    lost = keep & (found == 0) & (weight != 0)
    return found, keep & ~lost, facts | {"rounded_to_zero": int(xp.count_nonzero(lost))}


def _descend(weight: Array, keep: Array, free: Array, gram: Array, grid: Grid) -> Array:
    xp = namespace(weight)
    q = xp.asarray(weight, copy=True)
    fixed = grid.pinned(weight)  # (out, n)
    diagonal = xp.clip(xp.linalg.diagonal(gram), TINY, None)  # (n,)
    slope = xp.zeros_like(q)  # (out, n): c
    for _ in range(PASSES):
        for start in range(0, q.shape[1], BLOCK):
            part = slice(start, min(start + BLOCK, q.shape[1]))
            here = gram[part, part]  # (b, b)
            moved = xp.zeros_like(q[:, part])  # (out, b)
            local = xp.asarray(slope[:, part], copy=True)  # (out, b)
            for j in range(moved.shape[1]):
                at = start + j
                best = q[:, at] + local[:, j] / diagonal[at]  # (out,)
                best = xp.where(free[:, at], best, grid.nearest(best))
                if fixed is not None:
                    best = xp.where(fixed[:, at], q[:, at], best)
                best = xp.where(keep[:, at], best, 0.0)
                moved[:, j] = best - q[:, at]
                q[:, at] = best
                local -= moved[:, j : j + 1] * here[j]  # (out, 1) * (b,)
            slope -= moved @ gram[part]  # (out, b) @ (b, n)
    return q


def _errors(weight: Array, q: Array, gram: Array) -> Array:
    missing = weight - q
    return row_products(missing, missing @ gram)  # (out, 1)
