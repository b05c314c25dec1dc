"""What a compressed delta holds beside its low rank: the sign of every entry, with a scale a row.

Source: Liu et al. 2024, "BitDelta"; Yao et al. 2025, "DeltaZip".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.delta.drawn import decomposed

Array = np.ndarray[Any, Any]

# What each kind of rest consists of.
PARTS = {"": (), "signs": ("signs", "scale")}


def sign_table() -> Array:
    """(256, 8): the signs that a byte stands for, the lowest bit first.

    Example:
        >>> sign_table()[5].tolist()
        [1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    """
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return (2.0 * bits - 1).astype(np.float32)


def flat(weight: Array) -> Array:
    """A weight as rows: (first axis, all others)."""
    return weight.reshape(weight.shape[0], -1)


def shapes(rest: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Part -> shape and element type, for a weight of a shape.

    Example:
        >>> shapes("signs", (3, 10))
        {'signs': ((3, 2), 'uint8'), 'scale': ((3,), 'float32')}
    """
    if not rest:
        return {}
    columns = int(np.prod(shape[1:]))
    return {"signs": ((shape[0], -(-columns // 8)), "uint8"), "scale": ((shape[0],), "float32")}


def signs_of(change: Array) -> tuple[Array, Array]:
    """The signs of (rows, columns), eight a byte, and each row's scale: the mean of its magnitudes, which is nearest.

    Example:
        >>> signs, scale = signs_of(np.array([[1.0, -3.0]]))
        >>> signs.tolist(), scale.tolist()
        ([[1]], [2.0])
    """
    packed = np.packbits(change >= 0, axis=1, bitorder="little")
    return packed, np.abs(change).mean(1).astype(np.float32)


def dense(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """What signs and scales add to a weight of that shape, in float32.

    Example:
        >>> dense({"signs": np.array([[1]], np.uint8), "scale": np.array([2.0])}, (1, 2)).tolist()
        [[2.0, -2.0]]
    """
    signs = sign_table()[parts["signs"]].reshape(shape[0], -1)[:, : int(np.prod(shape[1:]))]
    found: Array = (signs * parts["scale"].astype(np.float32)[:, None]).reshape(shape)
    return found


def nearest(matrix: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """a (rank, in) and b (out, rank) in float16 whose product is about the nearest of its rank to (out, in)."""
    a, b = leading(matrix, rank, rng)
    return a.astype(np.float16), b.astype(np.float16)


def leading(matrix: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """a (rank, in) and b (out, rank) of the same, in the matrix's own type.

    Exact where the rank is much of the smaller side; otherwise by a few passes over a random range.
    """
    smaller = min(matrix.shape)
    if rank + 8 >= smaller // 4:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = decomposed(matrix, rng.standard_normal((matrix.shape[1], rank + 8), dtype=np.float32), 3)
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root
