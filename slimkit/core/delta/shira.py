"""SHiRA: a delta that trains a few entries of a weight, chosen once, and leaves all others as they are.

Merging adds each value to its entry. With `support="nonzero"` only entries that are not zero are chosen, so that a
sparse base stays as sparse as it was.

Source: Bhardwaj et al. 2024, "Sparse High Rank Adapters", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta.spec import Site
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]

SUPPORTS = ("nonzero", "magnitude", "random")
VALUES = "mindpet_delta_shira.mindpet_delta_shira_values"  # below a layer
INDEX = "mindpet_delta_shira.mindpet_delta_shira_index"


@dataclass(frozen=True)
class ShiraSpec:
    """One SHiRA on one layer.

    Args:
        rank: a layer (outputs, inputs) has rank * (outputs + inputs) entries, as many as a LoRA of that rank.
        support: which entries: "nonzero", drawn among those that are not zero; "magnitude", the largest; "random",
            drawn among all, so that zeros are filled when merged.
        seed: of what is drawn.
        count: how many entries there are; 0 until they are chosen.
    """

    rank: int = 8
    support: str = "nonzero"
    seed: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        check.positive(self.rank, "rank")
        check.choice(self.support, SUPPORTS, "support")
        check.integer(self.seed, "seed", minimum=0)
        check.integer(self.count, "count", minimum=0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def by_layer(
    sites: Mapping[str, Site], paths: Iterable[str], rank: Any = 8, support: Any = "nonzero", seed: Any = 0
) -> dict[str, ShiraSpec]:
    """Path -> SHiRA, of each chosen layer; the seed grows by one from layer to layer.

    Raises:
        ArgumentError: a layer has fewer weights than the rank asks for.

    Example:
        >>> by_layer({"q": Site("linear", (40, 60))}, ["q"], rank=3)["q"].support
        'nonzero'
    """
    spec = ShiraSpec(rank, support, seed)
    paths = list(paths)
    for path in paths:
        outputs, inputs = sites[path].shape
        if spec.rank * (outputs + inputs) > outputs * inputs:
            raise ArgumentError(
                f"rank of {path} must be at most {outputs * inputs // (outputs + inputs)}: it has {outputs * inputs} "
                f"weights. Received: {spec.rank}."
            )
    return {path: ShiraSpec(spec.rank, spec.support, spec.seed + i) for i, path in enumerate(paths)}


def chosen(weight: Array, spec: ShiraSpec) -> Array:
    """The entries that train, as flat indices in rising order (int32), the same in every framework.

    Args:
        weight: (outputs, inputs).
        spec: how many, and which. A sparse weight may have fewer that are not zero: then all of those.

    Raises:
        UnsupportedError: every entry is zero, and `support` keeps away from zeros.

    Example:
        >>> chosen(np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 4.0], [5.0, 0.0, 0.0]]), ShiraSpec(1, "magnitude")).tolist()
        [1, 2, 3, 5, 6]
    """
    flat = np.asarray(weight).reshape(-1)
    if flat.size >= 2**31:
        raise UnsupportedError(f"shira takes weights of less than 2**31 entries; this one has {flat.size}.")
    count = spec.rank * sum(weight.shape)
    if spec.support == "random":
        places = np.random.default_rng(spec.seed).choice(flat.size, count, replace=False, shuffle=False)
    else:
        places = np.flatnonzero(flat)
        if not places.size:
            raise UnsupportedError(
                f"every weight is zero, and support={spec.support!r} keeps zeros; support='random' trains zeros too."
            )
        if spec.support == "magnitude" and places.size > count:
            places = places[np.argsort(-np.abs(flat[places].astype(np.float32)), kind="stable")[:count]]
        elif places.size > count:
            drawn = np.random.default_rng(spec.seed).choice(places.size, count, replace=False, shuffle=False)
            places = places[drawn]
    return np.sort(places).astype(np.int32)


def weight_change(values: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """What the values add to a weight of that shape.

    Example:
        >>> weight_change(np.array([5.0]), np.array([2]), (2, 2)).tolist()
        [[0.0, 0.0], [5.0, 0.0]]
    """
    found = np.zeros(int(np.prod(shape)), values.dtype)
    found[index] = values
    return found.reshape(shape)


def refuse_index(index: Array, size: int, name: str, where: str) -> None:
    """Refuse a file's indices that are no places among `size`, each once and rising.

    Raises:
        FileFormatError: they are not whole numbers, out of range, or one comes twice.
    """
    # Wide, so that no difference wraps around; then the first and the last are the bounds of all.
    places = index.astype(np.int64) if index.dtype.kind == "i" else None
    if places is None or (places.size and (places[0] < 0 or places[-1] >= size or not (np.diff(places) > 0).all())):
        raise FileFormatError(f"{where}: {name} must name places among {size} entries, each once, rising.")
