"""Correlations of a layer's inputs: what its calibration rows showed, brought closer to what many rows would show."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from slimkit.core.sparse import shrink
from slimkit.core.sparse.backend import Array, eigh, inner, like, namespace, to_numpy
from slimkit.core.sparse.factor import STRIP, inverse_factor, inverse_from, quadratic


class Correlations(Protocol):
    """Estimated correlations, and the sample they were made of.

    Attributes:
        matrix: (n, n) the estimate, positive definite, ones on the diagonal or nearly so.
        share: how much of it is the identity, 0..1.
    """

    matrix: Array
    share: float

    def inverse(self, penalty: float) -> Array:
        """(matrix + penalty)^-1, in memory of its own."""

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """tr(D S D^T) of rows D (out, n) under the sample S, by way of the same under `matrix` where that is known."""


class Mixed:
    """The sample mixed with the identity.

    Args:
        sample: (n, n), ones on the diagonal; its memory becomes `matrix`.
        count: rows behind it.
    """

    def __init__(self, sample: Array, count: int) -> None:
        self.matrix, self.share = shrink.linear(sample, count)

    def inverse(self, penalty: float) -> Array:
        """(matrix + penalty)^-1: the diagonal's mean is one, so damping is the penalty."""
        return inverse_from(inverse_factor(self.matrix, penalty)[0])

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """What the identity added to the loss taken off again."""
        whole = quadratic(rows.T, self.matrix) if loss is None else loss
        return (whole - self.share * inner(rows, rows)) / (1 - self.share)


class Spectral:
    """Every eigenvalue of the sample shrunk by itself, and a share of the identity.

    Tokens of one text resemble each other, so that rows count for less than they are and the smallest directions are
    known less well than independent rows would know them: hence the identity's share as well.

    Args:
        sample: (n, n), ones on the diagonal; its memory becomes `matrix`.
        count: rows behind it.
    """

    def __init__(self, sample: Array, count: int) -> None:
        self._sample, self._vectors = eigh(sample)
        values = to_numpy(self._sample)
        self.share = shrink.share(len(values), float((values**2).sum()), count)
        found = shrink.nonlinear(values, count) * (1 - self.share) + self.share
        xp = namespace(sample)
        self._values = xp.astype(like(np.asarray(found), self._sample), sample.dtype)
        self.matrix = self._with(self._values, sample)

    def inverse(self, penalty: float) -> Array:
        """(matrix + penalty)^-1, from the eigenvalues."""
        return self._with(1 / (self._values + penalty), namespace(self._vectors).empty_like(self._vectors))

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """From the sample's own eigenvalues."""
        xp = namespace(rows)
        turned = rows @ self._vectors
        turned *= turned
        return float(xp.sum(xp.sum(turned, axis=0) * self._sample))

    def _with(self, values: Array, out: Array) -> Array:
        """Fill a matrix with the one of these eigenvalues; a half is calculated and mirrored."""
        vectors = self._vectors
        for start in range(0, vectors.shape[0], STRIP):
            stop = start + STRIP
            out[start:stop, start:] = (vectors[start:stop] * values) @ vectors[start:].T
            out[stop:, start:stop] = out[start:stop, stop:].T
        return out
