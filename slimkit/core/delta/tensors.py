"""A delta file's tensors as NumPy arrays, in the very element types that the file has."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint.weightfile import Safetensors

Array = np.ndarray[Any, Any]

# Element types that NumPy lacks: safetensors' name -> ml_dtypes' name, which is torch's as well.
_FURTHER = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FURTHER = frozenset(_FURTHER.values())


def further(name: str) -> np.dtype[Any]:
    """One of the element types that NumPy lacks, by its name in ml_dtypes.

    Example:
        >>> further("bfloat16").itemsize
        2
    """
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def read(path: files.PathLike, name: str) -> dict[str, Array]:
    """The tensors of a safetensors file; FileFormatError when it is damaged.

    Args:
        path: the file.
        name: what it is, for messages.
    """
    file = files.readable_file(path, name)
    with Safetensors(file) as weights:
        found = {}
        for key, entry in weights.entries.items():
            stored = weights.raw(key)
            found[key] = stored.view(further(_FURTHER[entry.dtype])) if entry.dtype in _FURTHER else stored
        return found


def bits(array: Array) -> Array:
    """An array of a type that NumPy lacks as whole numbers of its size; any other as it is.

    Example:
        >>> bits(np.ones(1, further("bfloat16"))).tolist()
        [16256]
    """
    if array.dtype.name not in FURTHER:
        return array
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def wide(array: Array) -> Array:
    """An array to compute with: what NumPy lacks as float32, any other as it is."""
    return array.astype(np.float32) if array.dtype.name in FURTHER else array
