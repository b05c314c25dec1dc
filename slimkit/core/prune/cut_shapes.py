"""The shapes that all values of a traced model have after a cut, computed from what its parameters keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from slimkit.core.prune.dims import FREE, PRODUCT, SUM, Dim, find, leaves
from slimkit.core.prune.expressions import Index
from slimkit.core.prune.relations import Relations


class CutShapes:
    """Sizes after a cut.

    Args:
        relations: the axes of a traced model.
        keep: path of a parameter -> for each axis the kept indices, or None where all stay.
    """

    def __init__(self, relations: Relations, keep: Mapping[str, Sequence[Index | None]]) -> None:
        self._relations = relations
        self._counts: dict[Dim, int] = {}
        for path, index in keep.items():
            for dim, kept in zip(relations.params.get(path, ()), index):
                if kept is not None:
                    self._read(dim, np.asarray(kept))

    def _read(self, dim: Dim, kept: Index) -> None:
        """Read off how much each variable of an axis keeps."""
        dim = find(dim)
        if dim.kind == SUM:
            start = 0
            for part in map(find, dim.parts):
                inside = kept[(kept >= start) & (kept < start + part.size)]
                self._read(part, inside - start)
                start += part.size
        elif dim.kind == PRODUCT:
            inner = dim.size
            for part in map(find, dim.parts):
                inner //= part.size
                self._read(part, np.unique(kept // inner % part.size))
        elif dim.kind == FREE:
            self._counts[dim] = len(kept)

    def size(self, dim: Dim) -> int | None:
        """Size of an axis; None for a broadcast one, which takes any."""
        dim = find(dim)
        if any(leaf.elastic and leaf.kind == FREE for leaf in map(find, leaves(dim))):
            return None
        if dim.kind in (PRODUCT, SUM):
            sizes = [self.size(part) or 0 for part in dim.parts]
            return math.prod(sizes) if dim.kind == PRODUCT else sum(sizes)
        return self._counts.get(dim, dim.size)

    def shape(self, number: int) -> tuple[int | None, ...]:
        """Shape of a traced value."""
        return tuple(map(self.size, self._relations.dims[number]))
