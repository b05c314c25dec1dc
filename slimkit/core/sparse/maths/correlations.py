"""Correlations of a layer's inputs: what its calibration rows showed, brought closer to what many rows would show."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from slimkit.core.sparse.maths import shrink
from slimkit.core.sparse.maths.backend import Array, device_of, eigh, inner, like, namespace, own_copy, to_numpy
from slimkit.core.sparse.maths.factor import STRIP, inverse_factor, inverse_from, quadratic


class Correlations(Protocol):
    """Estimated correlations, and the sample they were made of.

    Attributes:
        share: how much of the estimate is the identity, 0..1.
    """

    share: float

    def matrix(self) -> Array:
        """The estimate (n, n), positive definite, the diagonal's mean one; `inverse` may use its memory again."""

    def inverse(self, penalty: float) -> Array:
        """(estimate + penalty)^-1; the next call of this or of `matrix` may use its memory again."""

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """tr(D S D^T) of rows D (out, n) under the sample S, from the same under the estimate where that is known."""


class Mixed:
    """The sample mixed with the identity.

    Args:
        sample: (n, n), ones on the diagonal; its memory becomes the estimate's.
        count: rows behind it.
    """

    def __init__(self, sample: Array, count: int) -> None:
        self._matrix, self.share = shrink.linear(sample, count)

    def matrix(self) -> Array:
        """The mixture."""
        return self._matrix

    def inverse(self, penalty: float) -> Array:
        """(estimate + penalty)^-1: the diagonal's mean is one, so damping is the penalty."""
        return inverse_from(inverse_factor(self._matrix, penalty)[0])

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """What the identity added to the loss taken off again."""
        whole = quadratic(rows.T, self._matrix) if loss is None else loss
        return (whole - self.share * inner(rows, rows)) / (1 - self.share)


# Up to this many columns eigenvectors are found in float64 and then rounded: the small eigenvalues of float32 sums are
# told apart from rounding, so that a support found twice differs in six times fewer places (400 columns, 384 rows; in
# none with 1200 rows), for a few hundredths of par_v2's time. Beyond, the copies would be most of its memory.
PRECISE_COLUMNS = 1024


def _is_cheap(sample: Array) -> bool:
    # NPUs and MPS have no float64.
    return sample.shape[0] <= PRECISE_COLUMNS and str(device_of(sample)).startswith(("cpu", "cuda"))


class Spectral:
    """Every eigenvalue of the sample shrunk by itself, and a share of the identity.

    Tokens of one text resemble each other, so that rows count for less than they are and the smallest directions are
    known less well than independent rows would know them: hence the identity's share as well.

    Args:
        sample: (n, n), ones on the diagonal; its memory serves for the estimate and inverses in turn.
        count: rows behind it.
    """

    def __init__(self, sample: Array, count: int) -> None:
        xp = namespace(sample)
        found_values, vectors = eigh(own_copy(sample, xp.float64) if _is_cheap(sample) else sample)  # (n,), (n, n)
        values = to_numpy(found_values)
        self._sample = xp.astype(found_values, sample.dtype, copy=False)
        self._vectors = xp.astype(vectors, sample.dtype, copy=False)
        self.share = shrink.share(len(values), float((values**2).sum()), count)
        found = shrink.nonlinear(values, count) * (1 - self.share) + self.share
        self._values = xp.astype(like(np.asarray(found), self._sample), sample.dtype)
        self._room = sample

    def matrix(self) -> Array:
        """The estimate, from the shrunk eigenvalues."""
        return self._with(self._values)

    def inverse(self, penalty: float) -> Array:
        """(estimate + penalty)^-1, from the same."""
        return self._with(1 / (self._values + penalty))

    def sample_loss(self, rows: Array, loss: float | None = None) -> float:
        """From the sample's own eigenvalues."""
        xp = namespace(rows)
        turned = rows @ self._vectors
        turned *= turned
        return float(xp.sum(xp.sum(turned, axis=0) * self._sample))

    def _with(self, values: Array) -> Array:
        """The matrix of these eigenvalues; a half is calculated and mirrored."""
        vectors, out = self._vectors, self._room
        for start in range(0, vectors.shape[0], STRIP):
            stop = start + STRIP
            out[start:stop, start:] = (vectors[start:stop] * values) @ vectors[start:].T
            out[stop:, start:stop] = out[start:stop, stop:].T
        return out
