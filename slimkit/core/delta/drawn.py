"""Random numbers for a layer's delta, and what a decomposition through them finds; the same in both frameworks."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def drawing(seed: int, path: str) -> np.random.Generator:
    """The generator of one layer, whatever other layers there are."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())])


def decomposed(matrix: Array, start: Array, turns: int) -> tuple[Array, Array, Array]:
    """About the leading singular vectors and values of a matrix, from a few passes over a random range.

    Args:
        matrix: (n, m), float32.
        start: (m, width), normal random numbers; some more columns than are wanted, since the last ones are rough.
        turns: passes after the first; each lets the large directions stand out more.

    Returns:
        (n, width), (width,) and (width, m), as `np.linalg.svd` gives them.

    Source:
        Halko, Martinsson & Tropp 2011, "Finding Structure with Randomness", algorithm 4.4.

    Example:
        >>> start = np.random.default_rng(0).standard_normal((3, 2), np.float32)
        >>> u, s, vt = decomposed(np.diag([1.0, 3.0, 2.0]).astype(np.float32), start, 9)
        >>> s.round(2).tolist()
        [3.0, 2.0]
    """
    basis = np.linalg.qr(matrix @ start)[0]  # (n, width)
    for _ in range(turns):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    low, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ low, s, vt
