"""What runs through a large transformer: the mean square of every input channel of its matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import ArgumentError
from slimkit.core.weights.names import pair_names

Activations = Mapping[str, Array]


class Energies:
    """Gathers the squares of what linear layers are given, over every token that counts.

    Args:
        names: path of each layer -> name of its matrix in the model.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._sum: dict[str, Array] = {}
        self._count: dict[str, int] = {}

    def add(self, path: str, given: Array, mask: Array | None = None) -> None:
        """Add one batch.

        Args:
            path: the layer's.
            given: (..., channels), its input.
            mask: (...), true where a token counts; None: everywhere, or where its shape does not fit.
        """
        if mask is not None and mask.shape == given.shape[:-1]:
            given = given[mask != 0]
        rows = given.reshape(-1, given.shape[-1])
        self._sum[path] = self._sum.get(path, 0) + np.sum(np.square(rows, dtype=np.float64), axis=0)
        self._count[path] = self._count.get(path, 0) + len(rows)

    def mean(self) -> dict[str, Array]:
        """Name of each matrix that was run -> the mean square of its input channels, (channels,)."""
        if not self._sum:
            raise ArgumentError("the calibration data ran through no linear layer of the model.")
        return {self._names[path]: total / max(1, self._count[path]) for path, total in self._sum.items()}


def checked(activations: Mapping[str, Any]) -> dict[str, Array]:
    """Activations as `measure_activations` returns them, with every vector as float64.

    Raises:
        ArgumentTypeError: not a dict of arrays.
        ArgumentError: an empty dict, or a vector with a negative or infinite value.
    """
    what = "a dict of vectors, as measure_activations returns"
    check.instance(activations, Mapping, "activations", what)
    if not activations:
        check.wrong_value("activations", "a non-empty dict", activations)
    found: dict[str, Array] = {}
    for name, vector in activations.items():
        check.text(name, "a name in activations")
        try:
            found[name] = np.array(vector, np.float64)
        except (TypeError, ValueError):
            check.wrong_type(f"activations[{name!r}]", "a vector of numbers", vector)
        if found[name].ndim != 1 or not np.isfinite(found[name]).all() or (found[name] < 0).any():
            check.wrong_value(f"activations[{name!r}]", "a vector of finite numbers, none below 0", vector)
    return found


def of_file(activations: Activations | None, names: Iterable[str], wanted: Iterable[str]) -> dict[str, Array]:
    """Activations under the names of a file, which may have another prefix or another framework's words.

    Example:
        >>> of_file({"layer.up.weight": np.ones(2)}, ["bert.layer.up.weight"], ["bert.layer.up.weight"])
        {'bert.layer.up.weight': array([1., 1.])}
    """
    if activations is None:
        return {}
    pairs = pair_names(list(names), activations)
    return {name: activations[pairs[name]] for name in wanted if name in pairs}
