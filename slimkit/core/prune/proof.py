"""The zero-mask proof of a plan: a cut model must say what the uncut one says with the dropped indices at zero.

Where an operator takes statistics over a cut axis (a layer norm, a mean), the uncut model is to take them over the kept
indices alone, as the cut one does. What each axis of an activation keeps follows from the axes of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.errors import GraphError
from slimkit.core.prune.dims import PRODUCT, SUM, Dim, find
from slimkit.core.prune.relations import Relations
from slimkit.core.showing import Shown

Index = np.ndarray[Any, Any]


@dataclass(repr=False)
class PruningCheck(Shown):
    """What `check_pruning` found.

    Args:
        holds: whether every output agrees.
        difference: the largest difference between the cut model and the uncut one with zeros.
        scale: the largest output, which `difference` is to be read against.
        statistics: operators that took statistics over a cut axis, "operator in module".
    """

    holds: bool
    difference: float
    scale: float
    statistics: list[str] = field(default_factory=list)


def compare(cut: Sequence[Index], zeroed: Sequence[Index], tolerance: float, statistics: Sequence[str]) -> PruningCheck:
    """Compare the outputs of both models.

    Args:
        cut: outputs of the cut model.
        zeroed: outputs of the uncut one with zeros, in the same order.
        tolerance: largest difference allowed, as a share of the largest output.
        statistics: operators that were narrowed to kept indices.

    Raises:
        GraphError: they differ in number, shape or values; the message gives the largest difference.
    """
    if [a.shape for a in cut] != [a.shape for a in zeroed]:
        shapes = [list(a.shape) for a in cut], [list(a.shape) for a in zeroed]
        raise GraphError(f"the pruned model gives outputs of shapes {shapes[0]}, the original {shapes[1]}")
    scale = max([1e-30, *(float(np.abs(a).max()) for a in zeroed if a.size)])
    apart = [float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(cut, zeroed) if a.size]
    difference = max(apart, default=0.0)
    if not difference <= tolerance * scale:  # NaN does not either
        raise GraphError(
            f"the pruned model is not the original with zeros: outputs differ by {difference:.3g} where the largest is "
            f"{scale:.3g}. A norm or mean over a cut axis, or a rule that says too little, can cause that"
        )
    return PruningCheck(True, difference, scale, list(dict.fromkeys(statistics)))


class KeptIndices:
    """What each axis keeps under a plan.

    Args:
        relations: a traced model.
        indices: parameter -> kept indices of each axis, None for all.
    """

    def __init__(self, relations: Relations, indices: Mapping[str, Sequence[Index | None]]) -> None:
        self._known: dict[Dim, Index] = {}
        for path, axes in indices.items():
            for dim, index in zip(relations.params.get(path, ()), axes):
                if index is not None:
                    self._tell(dim, np.asarray(index))

    def _tell(self, dim: Dim, index: Index) -> None:
        dim = find(dim)
        self._known.setdefault(dim, index)
        done = 0
        for part in dim.parts if dim.kind == SUM else ():
            inside = index[(index >= done) & (index < done + part.size)] - done
            self._tell(part, inside)
            done += part.size
        if dim.kind == PRODUCT:
            for part, at in zip(dim.parts, np.unravel_index(index, [p.size for p in dim.parts])):
                self._tell(part, np.unique(at))

    def of(self, dim: Dim) -> Index:
        """Ascending kept indices of an axis."""
        dim = find(dim)
        found = self._known.get(dim)
        if found is not None:
            return found
        if dim.kind == SUM:
            return np.concatenate(list(self._terms(dim)))
        if dim.kind == PRODUCT:
            index = np.zeros(1, dtype=np.int64)
            for part in dim.parts:
                index = (index[:, None] * part.size + self.of(part)[None, :]).reshape(-1)
            return index
        return np.arange(dim.size)

    def _terms(self, dim: Dim) -> Iterator[Index]:
        done = 0
        for part in dim.parts:
            yield self.of(part) + done
            done += part.size
