"""Moments of few rows brought closer to what many rows would say."""

from __future__ import annotations

from slimkit.core.sparse.backend import Array, device_of, namespace


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
