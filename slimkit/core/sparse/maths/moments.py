"""Sums over calibration rows: the second moments that every data-driven method needs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.maths.backend import Array, add_product, device_of, inner, namespace, precision
from slimkit.core.sparse.maths.layer import SparseLayer

# Rows of a sum whose products are in memory at once, where each call's are made by themselves.
PANEL = 512
# The same of a symmetric sum of which one half is made: smaller ones make less of the other half.
HALF_PANEL = 256

# Rows longer than so many times the median one of their call count as no longer: the first token of a language model is
# some hundred times as long as the others (massive activations, Sun et al. 2024), and squares would leave nothing of
# what the others ask for.
LONGEST = 10.0

# The arrays that are summed over rows, and over processes.
SUMS = ("gram", "total", "cross", "missing", "dense_total", "drift_cross", "drift_total")

SPOILT = "dataset must give finite inputs to every layer. Received: NaN or infinity (or sums beyond float32)"


class SpoiltError(ArgumentError):
    """A layer's inputs are not finite."""


class Moments:
    """Second moments of one layer's inputs, summed in float32 (float64 when narrow) over every row of every batch.

    Args:
        layer: the layer.
        paired: also sum the products with the dense model's inputs; of a linear layer no row counts as longer than
            `LONGEST` times the median one then.
        weight: the layer's dense weight, to sum `missing` and not `cross`: less to add and to keep where outputs are
            fewer than inputs, and exact where the inputs hardly differ. Only one layer can use such moments.
        apart: make the product of each call's rows by itself before it is added, so that the sums come out alike to
            the last bit wherever that product was made (see `fold`). Of the symmetric one only one half is made then.

    Attributes:
        count: rows seen.
        gram: (groups, n_in, n_in) sum of x x^T, None before the first row; where one half is made, `average` adds the
            other.
        total: (groups, n_in) sum of x.
        cross: (groups, n_in, n_in) sum of dense x times sparse x^T; None when not paired, or where `missing` is.
        missing: (groups, n_out, n_in) sum of weight (dense x - x) times x^T; None when not paired or without a weight.
        dense_total: (groups, n_in) sum of the dense x.
        drift_cross: (1, n_out, n_in) sum of drift times sparse x^T; None when unknown.
        drift_total: (1, n_out) sum of the drift.
    """

    def __init__(self, layer: SparseLayer, paired: bool = False, weight: Array = None, apart: bool = False) -> None:
        self.layer = layer
        self._weight = weight
        self._apart = apart
        # Where dense rows have sums of the same shape, all is made alike: of equal rows the two are equal to the bit.
        self._half = apart and layer.groups == 1 and (not paired or weight is not None)
        self.paired = paired
        self._bounds = paired and layer.kind != "conv2d"
        self.count = 0
        self.gram: Array = None
        self.total: Array = None
        self.cross: Array = None
        self.missing: Array = None
        self.dense_total: Array = None
        self.dense_square = 0.0
        self.dense_inner = 0.0
        self.drift_cross: Array = None
        self.drift_total: Array = None
        self._averaged = False

    def add(self, x: Array, dense: Array = None, drift: Array = None) -> None:
        """Add the rows of one call's input.

        Args:
            x: the input of the sparse model's layer, padded already for a convolution.
            dense: the input of the same layer in the dense model, row by row the same tokens; None when unknown.
            drift: (..., n_out) what the dense model adds to the layer's output minus what this one adds; None when
                unknown. Every call must give it, or none.
        """
        if self._averaged:
            raise RuntimeError(f"the moments of {self.layer.name!r} are means already")
        xp = namespace(x)
        first = self.count == 0
        if dense is None or dense.shape != x.shape:
            self.paired = False  # routing sent other tokens here: rows no longer correspond
            self.cross = self.missing = self.dense_total = None
            drift = None
        if self._bounds:
            bound = shares(dense if self.paired else x)
            x, dense = x * bound, dense * bound if self.paired else None
            drift = None if drift is None else drift * xp.reshape(bound, (*drift.shape[:-1], 1))
        pieces = (
            zip(self.layer.rows(x), self.layer.rows(dense)) if self.paired else ((r, None) for r in self.layer.rows(x))
        )
        for rows, dense_rows in pieces:
            dtype = precision(rows, rows.shape[2])
            rows = xp.astype(rows, dtype, copy=False)
            if self.gram is None:
                self.gram = _zeros(rows, rows.shape[2])
                self.total = _zeros(rows)
            turned = xp.permute_dims(rows, (0, 2, 1))
            self.count += rows.shape[1]
            _add(self.gram, turned, rows, self._apart, self._half)
            self.total += xp.sum(rows, axis=1)
            if self.paired:
                self._add_dense(rows, xp.astype(dense_rows, dtype, copy=False))
        if drift is None or not (first or self.drift_cross is not None):
            self.drift_cross = self.drift_total = None
            return
        drift = xp.astype(drift.reshape(1, -1, drift.shape[-1]), dtype, copy=False)
        if first:
            self.drift_cross = _zeros(rows, drift.shape[2])
            self.drift_total = _zeros(drift)
        _add(self.drift_cross, xp.permute_dims(drift, (0, 2, 1)), rows, self._apart)
        self.drift_total += xp.sum(drift, axis=1)

    def _add_dense(self, rows: Array, dense: Array) -> None:
        xp = namespace(rows)
        if self.dense_total is None:
            self.dense_total = _zeros(rows)
            if self._weight is None:
                self.cross = _zeros(rows, rows.shape[2])
            else:
                self.missing = _zeros(rows, self.layer.n_out)
        if self._weight is None:
            _add(self.cross, xp.permute_dims(dense, (0, 2, 1)), rows, self._apart)
        else:
            matrix = xp.astype(self.layer.to_matrix(self._weight), rows.dtype, copy=False)
            _add(self.missing, matrix @ xp.permute_dims(dense - rows, (0, 2, 1)), rows, self._apart)
        self.dense_total += xp.sum(dense, axis=1)
        self.dense_square += inner(dense, dense)
        self.dense_inner += inner(dense, rows)

    def alike(self) -> Moments:
        """Moments of the same layer without rows."""
        made = Moments(self.layer, self.paired, self._weight, self._apart)
        made._half, made._bounds = self._half, self._bounds  # whatever has become of the pairs by now
        return made

    def flat(self, name: str) -> Array:
        """One of the sums in one piece, as processes exchange it: of a symmetric one the half that was made."""
        array = getattr(self, name)
        if name != "gram" or not self._half:
            return array.reshape(-1)
        n = self.layer.n_in
        return namespace(array).concat([array[0, r, r.start :].reshape(-1) for r in _panels(n, HALF_PANEL)])

    def flat_size(self, name: str) -> int:
        """How many numbers `flat` gives."""
        if name != "gram" or not self._half:
            return prod(self.shape(name))
        n = self.layer.n_in
        return sum((r.stop - r.start) * (n - r.start) for r in _panels(n, HALF_PANEL))

    def take(self, name: str, flat: Array) -> None:
        """Take as one of the sums what `flat` gave."""
        if name != "gram" or not self._half:
            setattr(self, name, flat.reshape(self.shape(name)))
            return
        n, at = self.layer.n_in, 0
        self.gram = namespace(flat).zeros((1, n, n), dtype=flat.dtype, device=device_of(flat))
        for r in _panels(n, HALF_PANEL):
            high, wide = r.stop - r.start, n - r.start
            self.gram[0, r, r.start :] = flat[at : at + high * wide].reshape(high, wide)
            at += high * wide

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of the sums."""
        groups, n_in, n_out = self.layer.groups, self.layer.n_in, self.layer.n_out
        if name.startswith("drift"):
            return (1, n_out, n_in) if name == "drift_cross" else (1, n_out)
        if name in ("total", "dense_total"):
            return (groups, n_in)
        return (groups, n_out if name == "missing" else n_in, n_in)

    def facts(self) -> dict[str, Any]:
        """What these moments are beside their arrays, as plain JSON values."""
        numbers = {"count": self.count, "square": self.dense_square, "inner": self.dense_inner}
        return {**numbers, "paired": self.paired, "has": [f for f in SUMS if getattr(self, f) is not None]}

    def fold(self, facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Add the moments of one call, made elsewhere by `alike().add(...)`: the same to the last bit as `add` here.

        Args:
            facts: of those moments.
            arrays: name of a sum -> its array, or the same part of every array.
        """
        first = self.count == 0
        self.count += facts["count"]
        if not facts["paired"]:
            self.paired = False
            self.cross = self.missing = self.dense_total = None
        if self.paired:
            self.dense_square += facts["square"]
            self.dense_inner += facts["inner"]
        drifts = "drift_cross" in facts["has"] and (first or self.drift_cross is not None)
        if not drifts or first:
            self.drift_cross = self.drift_total = None
        for name, array in arrays.items():
            if name in ("gram", "total") or (drifts if name.startswith("drift") else self.paired):
                if getattr(self, name) is None:
                    setattr(self, name, namespace(array).zeros_like(array))
                total = getattr(self, name)
                total += array

    def average(self) -> None:
        """Turn the sums over rows into means, in place: no second Hessian in memory. No row can be added after it."""
        if not self._averaged:
            self._averaged = True
            for r in _panels(self.layer.n_in, HALF_PANEL) if self._half and self.gram is not None else ():
                self.gram[0, r.stop :, r] = self.gram[0, r, r.stop :].T
            count = max(self.count, 1)  # an expert that nobody chose has no rows, nor has padding
            for array in self.state():
                array /= count
            self.dense_inner /= count
            self.dense_square /= count

    def check_finite(self) -> None:
        """Refuse moments of inputs that were NaN or infinite, naming the layer."""
        if self.gram is not None:
            xp = namespace(self.gram)
            # One pass each: infinity or NaN anywhere spoils the sum.
            sums = [xp.sum(a) for a in (self.gram, self.cross, self.missing, self.drift_cross) if a is not None]
            if not all(bool(xp.isfinite(s)) for s in sums):
                raise SpoiltError(f"{SPOILT} at the input of {self.layer.name!r}")

    @property
    def related(self) -> bool:
        """Whether dense and sparse rows are the same tokens: their cosine is far from zero."""
        if self.cross is None and self.missing is None:
            return False
        xp = namespace(self.gram)
        sparse = float(xp.sum(xp.linalg.diagonal(self.gram)))
        return self.dense_inner > 0.5 * (self.dense_square * sparse) ** 0.5 > 0

    def state(self) -> list[Array]:
        """The arrays to sum over processes."""
        return [a for a in (getattr(self, name) for name in SUMS) if a is not None]


def shares(rows: Array) -> Array:
    """What makes no row (..., n) longer than `LONGEST` times the median one that is not zero: (..., 1), at most 1.

    Example:
        >>> import numpy as np
        >>> shares(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 40.0]])).tolist()
        [[1.0], [1.0], [0.25]]
    """
    xp = namespace(rows)
    # By the largest entry first: squares of half-precision rows may be beyond it.
    sizes = xp.max(xp.abs(rows), axis=-1, keepdims=True)
    sizes = xp.where(sizes > 0, sizes, xp.ones_like(sizes))
    lengths = sizes * xp.sqrt(xp.sum((rows / sizes) ** 2, axis=-1, keepdims=True))
    some = xp.sort(lengths[lengths > 0])
    if not some.shape[0] or not bool(xp.isfinite(some[-1])):
        return xp.ones_like(lengths)  # what is not finite is refused elsewhere
    longest = LONGEST * some[some.shape[0] // 2]
    return longest / xp.maximum(lengths, longest)


def _zeros(rows: Array, n: int | None = None) -> Array:
    """(groups, n, columns) or (groups, columns) zeros for sums over rows (groups, rows, columns)."""
    groups, _, columns = rows.shape
    shape = (groups, columns) if n is None else (groups, n, columns)
    return namespace(rows).zeros(shape, dtype=rows.dtype, device=device_of(rows))


def _panels(n: int, height: int) -> list[slice]:
    """Rows that are made at once."""
    return [slice(start, min(start + height, n)) for start in range(0, n, height)]


def _add(sums: Array, left: Array, right: Array, apart: bool, half: bool = False) -> None:
    """Add products of rows; `half` leaves out what lies below the diagonal, panel by panel."""
    if sums.shape[0] > 1:
        sums += left @ right
    elif not apart:  # the common case: without the product in memory
        add_product(sums[0], left[0], right[0])
    else:
        for r in _panels(sums.shape[1], HALF_PANEL if half else PANEL):
            begin = r.start if half else 0
            panel = sums[0, r, begin:]
            panel += left[0, r] @ right[0, :, begin:]
