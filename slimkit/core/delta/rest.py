"""What a compressed delta holds beside its low rank: the sign of every entry with a scale a row, or a few entries.

Source: Liu et al. 2024, "BitDelta"; Yao et al. 2025, "DeltaZip".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.delta.drawn import decomposed
from slimkit.core.errors import FileFormatError

Array = np.ndarray[Any, Any]

# What each kind of rest consists of.
PARTS = {"": (), "signs": ("signs", "scale"), "entries": ("index", "values")}


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


def shapes(rest: str, shape: tuple[int, ...], count: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Part -> shape and element type, for a weight of a shape; empty values of `count` entries.

    Example:
        >>> shapes("signs", (3, 10), 0)
        {'signs': ((3, 2), 'uint8'), 'scale': ((3,), 'float32')}
    """
    if rest == "signs":
        columns = int(np.prod(shape[1:]))
        return {"signs": ((shape[0], -(-columns // 8)), "uint8"), "scale": ((shape[0],), "float32")}
    return {"index": ((count,), "int32"), "values": ((count,), "float16")} if rest else {}


def signs_of(change: Array) -> tuple[Array, Array]:
    """The signs of (rows, columns), eight a byte, and each row's scale: the mean of its magnitudes, which is nearest.

    Example:
        >>> signs, scale = signs_of(np.array([[1.0, -3.0]]))
        >>> signs.tolist(), scale.tolist()
        ([[1]], [2.0])
    """
    packed = np.packbits(change >= 0, axis=1, bitorder="little")
    return packed, np.abs(change).mean(1).astype(np.float32)


def entries_of(change: Array, count: int) -> tuple[Array, Array]:
    """The `count` entries that are largest in magnitude: flat indices in rising order, and values in float16.

    Example:
        >>> [x.tolist() for x in entries_of(np.array([[0.5, -3.0], [2.0, 0.1]]), 2)]
        [[1, 2], [-3.0, 2.0]]
    """
    values = change.reshape(-1)
    places = np.sort(np.argpartition(-np.abs(values), count - 1)[:count])
    return places.astype(np.int32), values[places].astype(np.float16)


def dense(rest: str, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """What a rest adds to a weight of that shape, in float32.

    Example:
        >>> dense("signs", {"signs": np.array([[1]], np.uint8), "scale": np.array([2.0])}, (1, 2)).tolist()
        [[2.0, -2.0]]
    """
    if rest == "signs":
        signs = sign_table()[parts["signs"]].reshape(shape[0], -1)[:, : int(np.prod(shape[1:]))]
        found: Array = (signs * parts["scale"].astype(np.float32)[:, None]).reshape(shape)
        return found
    filled = np.zeros(int(np.prod(shape)), np.float32)
    filled[parts["index"]] = parts["values"]
    return filled.reshape(shape)


def nearest(matrix: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """a (rank, in) and b (out, rank) in float16 whose product is about the nearest of that rank to a matrix (out, in).

    Exact where the rank is much of the smaller side; otherwise by a few passes over a random range.
    """
    smaller = min(matrix.shape)
    if rank + 8 >= smaller // 4:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = decomposed(matrix, rng.standard_normal((matrix.shape[1], rank + 8), dtype=np.float32), 3)
    root = np.sqrt(s[:rank])
    return (root[:, None] * vt[:rank]).astype(np.float16), (u[:, :rank] * root).astype(np.float16)


def refuse_index(index: Array, size: int, name: str, where: str) -> None:
    """Refuse a file's indices that are no places among `size`, each once and rising.

    Raises:
        FileFormatError: they are not whole numbers, out of range, or one comes twice.
    """
    # Wide, so that no difference wraps around; then the first and the last are the bounds of all.
    places = index.astype(np.int64) if index.dtype.kind == "i" else None
    if places is None or (places.size and (places[0] < 0 or places[-1] >= size or not (np.diff(places) > 0).all())):
        raise FileFormatError(f"{where}: {name} must name places among {size} entries, each once, rising.")
