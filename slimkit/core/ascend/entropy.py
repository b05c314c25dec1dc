"""How many bits a weight its bytes hold: what a codec of single bytes, as those of devices are, cannot go below."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slimkit.core.ascend.folder import Array


def byte_entropy(values: Array) -> float:
    """Bits a weight, each of its bytes coded by its own frequencies (Shannon 1948).

    A codec that finds repetitions of several bytes may go below.

    Args:
        values: any shape and type; of float16 there are two streams of bytes, of int8 one.

    Example:
        >>> byte_entropy(np.array([0, 0, 1, 1], np.float16)), byte_entropy(np.array([0, 1, 2, 3], np.int8))
        (1.0, 2.0)
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    streams = flat.view(np.uint8).reshape(len(flat), flat.dtype.itemsize)
    total = 0.0
    for stream in streams.T:
        share = np.bincount(stream, minlength=256) / max(len(stream), 1)
        share = share[share > 0]
        total -= float(np.sum(share * np.log2(share)))
    return total + 0.0


def mean_entropy(tensors: Iterable[Array]) -> float:
    """Bits a weight over several tensors, each coded by its own frequencies; 0 for none.

    Example:
        >>> mean_entropy([np.zeros(4, np.int8), np.arange(4, dtype=np.int8)])
        1.0
    """
    found = [(byte_entropy(tensor), tensor.size) for tensor in tensors]
    total = sum(size for _, size in found)
    return sum(bits * size for bits, size in found) / total if total else 0.0
