"""How an optimizer's state follows the cut of its parameter: which indices of a moment stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.errors import PlanError
from slimkit.core.showing import Shown

Index = np.ndarray[Any, np.dtype[np.int64]]
Axes = list["Index | None"]


@dataclass(repr=False)
class OptimizerReport(Shown):
    """What `migrate_optimizer` did.

    Args:
        cut: parameter -> names of its states that were cut with it.
        kept: parameters of the optimizer that the plan leaves whole, or whose states were cut before.
        restarted: what begins anew, because no part of it holds for the cut model -> why.
        elsewhere: number of the optimizer's parameters that are not the model's.
    """

    cut: dict[str, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    restarted: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0


def state_axes(slot: str, shape: Sequence[int], before: Sequence[int], axes: Axes) -> Axes | None:
    """The kept indices of one state of a cut parameter.

    A state is a scalar, of its parameter's shape (moments; axes of size one stay), or its parameter's shape without one
    axis (the row and column statistics of Adafactor, Shazeer & Stern 2018, sec. 3).

    Args:
        slot: the state's name, such as "exp_avg".
        shape: of the state.
        before: the parameter's shape before the cut.
        axes: for each axis of the parameter the kept indices, or None where all stay.

    Returns:
        The same for the state; None where there is nothing to cut.

    Raises:
        PlanError: the state has another shape.

    Example:
        >>> keep = np.array([0, 2])
        >>> state_axes("exp_avg_sq_row", (3,), (3, 4), [keep, None])[0].tolist()
        [0, 2]
    """
    after = [n if index is None else len(index) for n, index in zip(before, axes)]
    rank = len(before)
    if int(np.prod(shape)) == 1 and not (len(shape) == rank and all(n == 1 for n in before)):
        return None
    if len(shape) == rank:
        if all(n in (1, old) for n, old in zip(shape, before)):
            return _or_none([index if n == old else None for n, old, index in zip(shape, before, axes)])
        if all(n in (1, new) for n, new in zip(shape, after)):
            return None
    if len(shape) == rank - 1:
        without = [[*range(k), *range(k + 1, rank)] for k in range(rank)]
        # Of a square matrix only the name tells rows from columns.
        if "row" in slot:
            without = [without[-1]]
        elif "col" in slot:
            without = [without[-2]]
        for sizes, cut in ((before, True), (after, False)):
            fits = [left for left in without if [sizes[k] for k in left] == list(shape)]
            found = [[axes[k] for k in left] for left in fits]
            if found and all(_same(found[0], other) for other in found[1:]):
                return _or_none(found[0]) if cut else None
    raise PlanError(
        f"the optimizer's {slot!r} has the shape {list(shape)}, its parameter had {list(before)} before desc and has "
        f"{after} after it. After several prunings, give merge_desc(first, second, ...)."
    )


def _or_none(axes: Axes) -> Axes | None:
    return axes if any(index is not None for index in axes) else None


def _same(one: Axes, other: Axes) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(one, other)
    )
