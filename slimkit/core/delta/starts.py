"""Starts of LoRA that are read from data: where the loss would move a layer, or where its inputs lie.

Both fill `a` alone; `b` is zero, so that training starts from the base and the delta is a plain LoRA from then on.

    gradient      rows of a: the leading right singular vectors of dL/dW    Wang et al. 2024, "LoRA-GA", sec. 3.2
    activations   rows of a: those of the layer's inputs                     Paischer et al. 2024, "EVA", sec. 3.1

Such directions are also the ones in which inputs are large: unit rows would answer ten times as loud as random ones,
and the usual rates would be ten times too high. Each row is as long as makes its answers as large as a random row's; no
input counts as longer than ten median ones there (see `LONGEST` of the sparse methods' moments).
LoRA-GA also starts b and takes b a out of the base, which makes files of twice the rank; that is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.core import check
from slimkit.core.delta.drawn import decomposed
from slimkit.core.delta.spec import LoraSpec, Site
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.sparse.maths.moments import shares

if TYPE_CHECKING:
    from slimkit.core.delta.framework import DeltaFramework

Array = np.ndarray[Any, Any]

# start -> what it is read from, for messages
FROM_DATA = {"gradient": "the gradient of the loss", "activations": "the layer's inputs"}
_ON = ("linear", "conv1d")
_SPARE = 8  # directions beside the wanted ones, which the iteration sharpens
_TURNS = 6
_HELD = 16  # directions that a sketch holds beside twice the wanted ones


def leading(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The leading singular values of a matrix, and its right singular vectors as rows.

    Args:
        matrix: (n, m).
        rank: how many; fewer are given where a side is smaller.

    Returns:
        (rank,) and (rank, m), float32; the sign of each row is such that its largest entry is positive.

    Example:
        >>> values, rows = leading(np.diag([1.0, 3.0, 2.0]), 2)
        >>> values.tolist(), np.abs(rows).round().tolist()
        ([3.0, 2.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    matrix = np.asarray(matrix, np.float32)
    size = min(matrix.shape)
    if size <= 2 * (rank + _SPARE):
        _, values, rows = np.linalg.svd(matrix, full_matrices=False)
    else:
        # Fixed random numbers: the same start whenever it is asked for.
        start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _SPARE)).astype(np.float32)
        _, values, rows = decomposed(matrix, start, _TURNS)
    values, rows = values[:rank], rows[:rank]
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return values, rows * np.where(largest < 0, -1, 1).astype(np.float32)


class Sketch:
    """The leading directions of rows that come batch by batch, without keeping the rows.

    Example:
        >>> sketch = Sketch(1)
        >>> for rows in (np.eye(3)[:1], 2 * np.eye(3)[1:2]):
        ...     sketch.add(rows)
        >>> np.abs(sketch.directions).tolist()
        [[0.0, 1.0, 0.0]]
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._held: Array = np.zeros((0, 0), np.float32)

    def add(self, rows: Array) -> None:
        """Take (n, m) more rows in."""
        rows = np.asarray(rows, np.float32)
        held = self._held if self._held.size else rows[:0]
        values, found = leading(np.concatenate((held, rows)), 2 * self.rank + _HELD)
        self._held = values[:, None] * found

    @property
    def directions(self) -> Array:
        """(at most rank, m): unit rows, the most told first; none where every row was zero."""
        if not self._held.size:
            return self._held
        lengths = np.linalg.norm(self._held[: self.rank], axis=1, keepdims=True)
        kept: Array = lengths[:, 0] > 1e-6 * max(float(lengths.max()), 1e-30)
        found: Array = self._held[: self.rank][kept] / lengths[kept]
        return found


def check_data(init: str, calibration: Any, loss: Any) -> list[Any]:
    """The batches that a start is read from; none for one that reads none.

    Raises:
        ArgumentError: the start wants data and there is none, or the other way round.
    """
    if init not in FROM_DATA:
        for name, value in (("calibration", calibration), ("loss", loss)):
            if value is not None:
                raise ArgumentError(f"{name} is for init='gradient' or 'activations'. Received: init={init!r}")
        return []
    if calibration is None:
        raise ArgumentError(f"init={init!r} reads {FROM_DATA[init]}: give calibration=, a list of batches.")
    if loss is not None:
        check.function(loss, "loss")
        if init != "gradient":
            raise ArgumentError(f"loss is for init='gradient'. Received: init={init!r}")
    return batches_of(calibration)


def batches_of(calibration: Any) -> list[Any]:
    """A list of at least one batch, checked.

    Raises:
        ArgumentTypeError, ArgumentError: it is none.
    """
    if isinstance(calibration, (Mapping, str)) or not isinstance(calibration, Sequence):
        check.wrong_type("calibration", "a list of batches", calibration)
    if not calibration:
        raise ArgumentError("calibration must hold at least one batch.")
    return list(calibration)


def work_out(
    access: DeltaFramework,
    model: Any,
    sites: Mapping[str, Site],
    specs: Mapping[str, LoraSpec],
    calibration: Sequence[Any],
    loss: Callable[..., Any] | None,
) -> tuple[dict[str, Array], list[str]]:
    """Where each layer's `a` starts: path -> (rank, inputs), and a line about layers that the data says nothing of.

    Args:
        access: the wing.
        model: the model; it is as it was afterwards.
        sites: every module path.
        specs: path -> LoRA, all with the same start.
        calibration: batches.
        loss: f(model, batch) -> scalar; None means the loss that the model gives itself.

    Raises:
        UnsupportedError: a layer of another kind than linear.
    """
    init = next(iter(specs.values())).init
    for path in specs:
        if sites[path].kind not in _ON:
            raise UnsupportedError(f"init={init!r} goes on linear layers; {path} is a {sites[path].type_name}.")
    paths = list(specs)
    if init == "gradient":
        gradients = access.gradients(model, paths, calibration, loss)
        found = {path: _directions(gradient, specs[path].rank) for path, gradient in gradients}
    else:
        sketches = {path: Sketch(spec.rank) for path, spec in specs.items()}
        access.given(model, paths, calibration, lambda path, rows: sketches[path].add(_bounded(rows)), loss)
        found = {path: sketch.directions for path, sketch in sketches.items()}
    loudness = {path: Loudness(rows) for path, rows in found.items() if len(rows)}
    access.given(model, list(loudness), calibration, lambda path, rows: loudness[path].add(_bounded(rows)), loss)
    silent = [path for path in specs if path not in loudness]
    notes = []
    if silent:
        notes.append(f"{FROM_DATA[init]} says nothing of {len(silent)} layers, which start at random: {silent[0]} ...")
    return {path: one.levelled() for path, one in loudness.items()}, notes


class Loudness:
    """How large the answers of unit rows are, beside those of random ones.

    Args:
        directions: (rank, m), unit rows.

    Example:
        >>> one = Loudness(np.array([[1.0, 0.0]]))
        >>> one.add(np.array([[3.0, 0.0], [0.0, 3.0]]))
        >>> one.levelled().astype(float).round(3).tolist()
        [[0.577, 0.0]]
    """

    def __init__(self, directions: Array) -> None:
        self.directions = directions
        self._answers, self._inputs = np.zeros(len(directions)), 0.0

    def add(self, rows: Array) -> None:
        """Take what a layer is given, (n, m), in."""
        self._answers += np.square(rows @ self.directions.T, dtype=np.float64).sum(0)
        self._inputs += float(np.square(rows, dtype=np.float64).sum())

    def levelled(self) -> Array:
        """The rows at the length at which their answers are as large as those of Kaiming-uniform ones.

        A Kaiming-uniform row has entries of variance 1 / (3 m): its answers have |x|^2 / (3 m) on average.
        """
        width = self.directions.shape[1]
        usual = self._inputs / (3 * width)
        # Never longer than random rows can be: what is silent here may speak later.
        lengths = np.sqrt(np.minimum(usual / np.maximum(self._answers, 1e-30), 1.0))
        found: Array = (self.directions * lengths[:, None]).astype(np.float32)
        return found


def _bounded(rows: Array) -> Array:
    """Rows of which none is longer than ten median ones: the first token of a language model may be hundreds."""
    with np.errstate(invalid="ignore"):  # what is not finite stays so
        return rows * shares(rows)


def _directions(gradient: Array, rank: int) -> Array:
    values, rows = leading(gradient, rank)
    return rows[values > 1e-6 * max(float(values.max(initial=0)), 1e-30)]
