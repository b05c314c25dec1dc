"""Sums over calibration rows: the second moments that every data-driven method needs."""

from __future__ import annotations

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse.backend import Array, add_product, device_of, namespace, precision
from slimkit.core.sparse.layer import Layer


class Moments:
    """Second moments of one layer's inputs, summed in float32 (float64 when narrow) over every row of every batch.

    Args:
        layer: the layer.
        paired: also sum the products with the dense model's inputs.

    Attributes:
        count: rows seen.
        gram: (groups, n_in, n_in) sum of x x^T, None before the first row.
        total: (groups, n_in) sum of x.
        cross: (groups, n_in, n_in) sum of dense x times sparse x^T; None when not paired.
        dense_total: (groups, n_in) sum of the dense x.
        drift_cross: (1, n_out, n_in) sum of drift times sparse x^T; None when unknown.
        drift_total: (1, n_out) sum of the drift.
    """

    def __init__(self, layer: Layer, paired: bool = False) -> None:
        self.layer = layer
        self.paired = paired
        self.count = 0
        self.gram: Array = None
        self.total: Array = None
        self.cross: Array = None
        self.dense_total: Array = None
        self.dense_square = 0.0
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
            self.cross = self.dense_total = None
            drift = None
        pieces = (
            zip(self.layer.rows(x), self.layer.rows(dense)) if self.paired else ((r, None) for r in self.layer.rows(x))
        )
        for rows, dense_rows in pieces:
            dtype = precision(rows, rows.shape[2])
            rows = xp.astype(rows, dtype, copy=False)
            if self.gram is None:
                shape, device = (rows.shape[0], rows.shape[2], rows.shape[2]), device_of(rows)
                self.gram = xp.zeros(shape, dtype=dtype, device=device)
                self.total = xp.zeros(shape[:2], dtype=dtype, device=device)
                if self.paired:
                    self.cross = xp.zeros(shape, dtype=dtype, device=device)
                    self.dense_total = xp.zeros(shape[:2], dtype=dtype, device=device)
            turned = xp.permute_dims(rows, (0, 2, 1))
            self.count += rows.shape[1]
            _add(self.gram, turned, rows)
            self.total += xp.sum(rows, axis=1)
            if self.paired:
                dense_rows = xp.astype(dense_rows, dtype, copy=False)
                _add(self.cross, xp.permute_dims(dense_rows, (0, 2, 1)), rows)
                self.dense_total += xp.sum(dense_rows, axis=1)
                self.dense_square += float(xp.sum(dense_rows * dense_rows))
        if drift is None or not (first or self.drift_cross is not None):
            self.drift_cross = self.drift_total = None
            return
        drift = xp.astype(drift.reshape(1, -1, drift.shape[-1]), dtype, copy=False)
        if first:
            shape, device = (1, drift.shape[2], rows.shape[2]), device_of(rows)
            self.drift_cross = xp.zeros(shape, dtype=dtype, device=device)
            self.drift_total = xp.zeros(shape[:2], dtype=dtype, device=device)
        _add(self.drift_cross, xp.permute_dims(drift, (0, 2, 1)), rows)
        self.drift_total += xp.sum(drift, axis=1)

    def average(self) -> None:
        """Turn the sums over rows into means, in place: no second Hessian in memory. No row can be added after it."""
        if not self._averaged:
            self._averaged = True
            for array in self.state():
                array /= self.count
            self.dense_square /= max(self.count, 1)  # an expert that nobody chose has no rows

    def check_finite(self) -> None:
        """Refuse moments of inputs that were NaN or infinite, naming the layer."""
        if self.gram is not None:
            xp = namespace(self.gram)
            # One pass each: infinity or NaN anywhere spoils the sum.
            sums = [xp.sum(a) for a in (self.gram, self.cross, self.drift_cross) if a is not None]
            if not all(bool(xp.isfinite(s)) for s in sums):
                raise ArgumentError(
                    f"dataset must give finite inputs to every layer. Received: NaN or infinity (or sums beyond "
                    f"float32) at the input of {self.layer.name!r}"
                )

    @property
    def related(self) -> bool:
        """Whether dense and sparse rows are the same tokens: their cosine is far from zero."""
        if self.cross is None:
            return False
        xp = namespace(self.cross)
        inner = float(xp.sum(xp.linalg.diagonal(self.cross)))
        sparse = float(xp.sum(xp.linalg.diagonal(self.gram)))
        return inner > 0.5 * (self.dense_square * sparse) ** 0.5 > 0

    def state(self) -> list[Array]:
        """The arrays to sum over processes."""
        return [
            a
            for a in (self.gram, self.total, self.cross, self.dense_total, self.drift_cross, self.drift_total)
            if a is not None
        ]


def _add(sums: Array, left: Array, right: Array) -> None:
    if sums.shape[0] == 1:  # the common case: without the product in memory
        add_product(sums[0], left[0], right[0])
    else:
        sums += left @ right
