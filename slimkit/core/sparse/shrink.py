"""Moments of few rows brought closer to what many rows would say: linear and nonlinear shrinkage of correlations."""

from __future__ import annotations

import math

from slimkit.core.sparse.backend import Array, device_of, eigh, namespace

# The kernel of the nonlinear estimator is laid out in pieces of about this many numbers.
PIECE = 1 << 22


def linear(correlation: Array, count: int) -> tuple[Array, float]:
    """Mix a correlation matrix with the identity by the oracle-approximating share (Chen et al. 2010, eq. 23).

    Args:
        correlation: (n, n), ones on the diagonal.
        count: rows behind it.

    Returns:
        The mixed matrix and the identity's share, 0..1.
    """
    xp = namespace(correlation)
    n = correlation.shape[0]
    square = float(xp.sum(correlation * correlation))
    spread = square - n
    share = 1.0
    if spread > 0 and count > 0:
        share = min(1.0, ((1 - 2 / n) * square + n * n) / ((count + 1 - 2 / n) * spread))
    eye = xp.eye(n, dtype=correlation.dtype, device=device_of(correlation))
    return correlation * (1 - share) + eye * share, share


def nonlinear(correlation: Array, count: int) -> tuple[Array, Array]:
    """Shrink each eigenvalue by what random-matrix theory says of its neighbours (Ledoit & Wolf 2020, section 4.7).

    Args:
        correlation: (n, n), ones on the diagonal.
        count: rows behind it, more than n.

    Returns:
        The shrunk eigenvalues (n,), ascending as they come, and the eigenvectors (n, n).
    """
    xp = namespace(correlation)
    values, vectors = eigh(correlation)
    n = correlation.shape[0]
    values = xp.clip(values, 1e-6 * float(xp.max(values)), None)
    ratio, width = n / count, count ** (-1 / 3)
    root5 = math.sqrt(5)
    shrunk = []
    step = max(1, PIECE // n)
    for start in range(0, n, step):
        own = values[start : start + step]
        at = (own[:, None] - values[None, :]) / (width * values[None, :])
        inside = 1 - at * at / 5
        density = xp.mean(3 / (4 * root5) * xp.clip(inside, 0.0, None) / (width * values[None, :]), axis=1)
        edge = xp.clip(xp.abs((root5 - at) / (root5 + at)), 1e-12, 1e12)
        hilbert = -3 / (10 * math.pi) * at + 3 / (4 * root5 * math.pi) * inside * xp.log(edge)
        hilbert = xp.mean(hilbert / (width * values[None, :]), axis=1)
        below = (math.pi * ratio * own * density) ** 2 + (1 - ratio - math.pi * ratio * own * hilbert) ** 2
        shrunk.append(own / below)
    return xp.concat(shrunk), vectors
