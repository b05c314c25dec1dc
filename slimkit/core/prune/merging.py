"""Several prunings of one model as one plan: descs compose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import PlanError
from slimkit.core.prune.plan import FORMAT, VERSION, PrunePlan

Index = np.ndarray[Any, np.dtype[np.int64]]


def merge_desc(first: dict[str, Any], *later: dict[str, Any]) -> dict[str, Any]:
    """Join the plans of prunings made one after another into the plan of the whole.

    Args:
        first: the plan that cut the uncut model.
        later: the plans that cut its result, in order.

    Returns:
        A plan that cuts the uncut model to the last result at once; neither argument is changed.

    Raises:
        PlanError: a plan is damaged, or does not begin where the one before it ends.

    Example:
        >>> from slimkit.core.prune.merging import example_desc
        >>> whole = merge_desc(example_desc(8, [0, 2, 4, 6]), example_desc(4, [1, 3]))
        >>> [v["keep"] for v in whole["variables"].values()]
        [[2, 6]]
    """
    merged = first
    PrunePlan(first)
    for step, desc in enumerate(later, 2):
        check.instance(desc, dict, f"desc {step}", "a dict as prune() returns it")
        merged = _join(merged, desc)
    return merged


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    one, two = PrunePlan(first), PrunePlan(second)
    try:
        names = two.match({**one.shapes, **one.sizes()})
    except PlanError as error:
        raise PlanError(f"the later desc must begin where the earlier one ends: {error}") from None
    kept: dict[str, list[Index | None]] = {path: list(axes) for path, axes in one.indices.items()}
    holes: dict[tuple[str, int], Index] = {}  # (parameter, axis) -> indices before both cuts that hold zeros
    for path, filled in one.filled().items() if one.padded else ():
        for axis, (index, rest) in enumerate(zip(one.indices[path], filled)):
            if index is not None and rest is not None:
                holes[path, axis] = np.setdiff1d(index, rest)
    filled_later = two.filled()
    for path, axes in two.indices.items():
        mine = names[path]
        before = kept.setdefault(mine, [None] * len(one.shapes[mine]))
        if len(axes) != len(before):
            raise PlanError(f"{mine} has {len(before)} axes in the earlier desc and {len(axes)} in the later one")
        for axis, index in enumerate(axes):
            was = before[axis]
            if index is not None:
                before[axis] = now = index if was is None else was[index]  # (kept twice,)
                rest = filled_later[path][axis]
                more = np.setdiff1d(index, index if rest is None else rest)
                more = more if was is None else was[more]
                holes[mine, axis] = np.intersect1d(np.union1d(holes.get((mine, axis), []), more), now)
    variables: dict[str, dict[str, Any]] = {}
    known: dict[tuple[int, bytes, bytes], str] = {}
    padded: dict[str, list[int]] = {}
    axes_of: dict[str, list[Any]] = {}
    for path, indices in kept.items():
        exprs: list[Any] = []
        for axis, (size, index) in enumerate(zip(one.shapes[path], indices)):
            zero = [int(i) for i in holes.get((path, axis), ())]
            if index is None or (len(index) == size and not zero):
                exprs.append(size)
                continue
            name = known.setdefault((size, index.tobytes(), np.asarray(zero).tobytes()), f"d{len(known)}")
            variables[name] = {"size": size, "keep": [int(i) for i in index]}
            if zero:
                padded[name] = zero
            exprs.append(name)
        if any(isinstance(e, str) for e in exprs):
            axes_of[path] = exprs
    groups = {**one.groups, **two.groups}
    derived = _changes(first.get("derived", {}), second.get("derived", {}))
    return {
        "format": FORMAT,
        "version": VERSION,
        "shapes": {p: list(s) for p, s in one.shapes.items()},
        "variables": variables,
        **({"padded": padded} if padded else {}),
        "axes": axes_of,
        "groups": {scope: [attribute, number] for scope, (attribute, number) in groups.items()},
        "attributes": _changes(first.get("attributes", {}), second.get("attributes", {})),
        "config": _changed("config", first.get("config", {}), second.get("config", {})),
        **({"derived": derived} if "derived" in first or "derived" in second else {}),
        "made": {
            **{k: v for k, v in second.get("made", {}).items() if k in ("framework", "left_params")},
            "steps": [dict(step) for step in (*one.steps, *two.steps)],
        },
    }


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    joined = {m: _changed(m, first.get(m, {}), second.get(m, {})) for m in {**first, **second}}
    return {module: changes for module, changes in joined.items() if changes}


def _changed(where: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """(before, after) of each name over both steps; one that ends as it began is left out."""
    out: dict[str, Any] = {name: list(pair) for name, pair in first.items()}
    for name, (old, new) in second.items():
        before, between = out.get(name, (old, old))
        if between != old:
            raise PlanError(f"the earlier desc leaves {where}.{name} at {between!r}, the later one begins at {old!r}")
        out[name] = [before, new]
    return {name: pair for name, pair in out.items() if pair[0] != pair[1]}


def example_desc(size: int, keep: list[int]) -> dict[str, Any]:
    """The plan of a vector of which some indices stay, for examples."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "shapes": {"weight": [size]},
        "variables": {"d0": {"size": size, "keep": keep}},
        "axes": {"weight": ["d0"]},
        "made": {},
    }
