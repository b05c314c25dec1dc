"""The axes of a tensor after a row-major change of shape."""

from __future__ import annotations

from collections.abc import Sequence

from slimkit.core.prune.dims import ONE, Dim, factor, find, fix, fixed, product


def regroup(dims: Sequence[Dim], shape: Sequence[int], why: str = "reshape") -> list[Dim]:
    """The axes after a row-major change of shape.

    Args:
        dims: the axes before.
        shape: the sizes after.
        why: what to name where the regrouping cannot be said and the axes concerned become fixed.

    Returns:
        One axis for each size.

    Example:
        >>> regroup([fixed(2, "batch"), Dim(6)], (2, 3, 2))
        [2, 3?, 2?]
    """
    out: list[Dim] = []
    before = [find(d) for d in dims if d.size != 1]
    after = [s for s in shape if s != 1]
    if 0 in after:
        for dim in before:
            fix(dim, why)
        return [fixed(s, why) for s in shape]
    i = j = 0
    while i < len(before) or j < len(after):
        # The shortest stretch of both sides with the same number of elements is regrouped on its own.
        group, sizes = [before[i]], [after[j]]
        i, j = i + 1, j + 1
        had, want = group[0].size, sizes[0]
        while had != want:
            if had < want:
                group.append(before[i])
                had *= before[i].size
                i += 1
            else:
                sizes.append(after[j])
                want *= after[j]
                j += 1
        out.extend(_regroup_stretch(group, sizes, why))
    filled = iter(out)
    return [ONE if s == 1 else next(filled) for s in shape]


def _regroup_stretch(group: list[Dim], sizes: list[int], why: str) -> list[Dim]:
    if len(sizes) == 1:
        return [product(group)]
    left, out = product(group), []
    for size in sizes[:-1]:
        pair = factor(left, size)
        if pair is None:
            for dim in group:
                fix(dim, f"{why} that mixes it with its neighbours")
            return [fixed(s, why) for s in sizes]
        out.append(pair[0])
        left = pair[1]
    return [*out, left]
