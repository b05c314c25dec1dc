"""Moments of few rows brought closer to what many rows would say."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.sparse.maths.backend import Array, inner

# The identity's share at most: with less of the sample its own loss could not be had back from the mixed one's.
MOST = 0.99


def linear(correlation: Array, count: int) -> tuple[Array, float]:
    """Mix correlations with the identity, in place, by the oracle-approximating share (Chen et al. 2010, eq. 23).

    Args:
        correlation: (n, n), ones on the diagonal; becomes the mixed one.
        count: rows behind it.

    Returns:
        The matrix and the identity's share, 0..0.99.
    """
    n = correlation.shape[0]
    part = min(MOST, share(n, inner(correlation, correlation), count))
    correlation *= 1 - part
    correlation.reshape(-1)[:: n + 1] += part
    return correlation, part


def share(n: int, square: float, count: int) -> float:
    """The identity's share for correlations of n channels whose squares add up to `square`."""
    if square <= n or count <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / n) * square + n * n) / ((count + 1 - 2 / n) * (square - n)))


# Rows of the kernel sums made at once: (PIECE, n) float64.
PIECE = 256


def nonlinear(eigenvalues: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Shrink each eigenvalue of sample correlations by itself (Ledoit & Wolf 2020, theorem 3.1 and section 4.7).

    A few strong directions stay as they are while the many weak ones, which the sample spreads out, come together
    again; one share for all, as `linear` takes it, must do both harm.

    Args:
        eigenvalues: (n,) ascending.
        count: rows behind the matrix.

    Returns:
        (n,) ascending, positive, with the same sum.

    Example:
        >>> nonlinear(np.array([0.5, 1.0, 1.5]), 30).sum().round(6)
        3.0
    """
    n = len(eigenvalues)
    if count < 2:  # one row shows no direction from another
        return np.full(n, max(float(np.mean(eigenvalues)), 1e-30))
    floor = 1e-7 * max(float(np.mean(eigenvalues)), 1e-30)
    null = max(0, n - count + 1) if count <= n else 0  # directions that so few rows cannot show
    seen = np.maximum(eigenvalues[null:].astype(np.float64), floor)
    ratio, width = n / count, max(count, 2) ** (-1 / 3)
    density, hilbert = _kernel(seen, width)
    if null:
        root = 5**0.5 * width
        at_zero = 0.3 / width**2 + 0.75 / root * (1 - 0.2 / width**2) * np.log((1 + root) / abs(1 - root))
        low = np.full(null, count / (null * max(at_zero * float(np.mean(1 / seen)), 1e-30)))
        shrunk = 1 / (np.pi**2 * seen * (density**2 + hilbert**2))
        shrunk = np.concatenate([low, shrunk])
    else:
        bent = np.pi * ratio * seen
        shrunk = seen / ((bent * density) ** 2 + (1 - ratio - bent * hilbert) ** 2)
    from scipy.optimize import isotonic_regression

    shrunk = np.maximum(isotonic_regression(shrunk).x, floor)
    result: np.ndarray[Any, Any] = shrunk * (np.maximum(eigenvalues, 0).sum() / shrunk.sum())
    return result


def _kernel(values: np.ndarray[Any, Any], width: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Epanechnikov density of the eigenvalues at each of them, and its Hilbert transform (equations 4.7 and 4.8)."""
    density, hilbert = np.empty_like(values), np.empty_like(values)
    spread = width * values  # bandwidths are proportional to the eigenvalues
    for start in range(0, len(values), PIECE):
        x = (values[start : start + PIECE, None] - values) / spread
        inside = 1 - x * x / 5
        near = np.abs(x) < 50
        edge = np.where(near & (np.abs(inside) > 1e-9), x, 0.0)
        arc = inside * np.log(np.abs((5**0.5 - edge) / (5**0.5 + edge)))
        # Far away the closed form is a difference of large numbers; there the series has converged.
        far = -(1 + 1 / np.where(near, 1.0, x * x)) / np.where(near, 1.0, x)
        transform = np.where(near, -0.3 * x + 0.75 / 5**0.5 * arc, far) / np.pi
        density[start : start + PIECE] = np.mean(0.75 / 5**0.5 * np.maximum(inside, 0) / spread, axis=1)
        hilbert[start : start + PIECE] = np.mean(transform / spread, axis=1)
    return density, hilbert
