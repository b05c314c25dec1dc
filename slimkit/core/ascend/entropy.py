"""How many bits a weight its bytes hold: what a codec of single bytes, as those of devices are, cannot go below."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np

from slimkit.core.ascend.folder import Array

# What `lzma_bits` packs of all tensors together, in a second or so; four times as much changes the third digit.
SAMPLE_BYTES = 1 << 19


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


def lzma_bits(tensors: Sequence[Array]) -> float:
    """Bits a weight that LZMA needs; 0 for no tensors.

    A general packer sees repetitions that `byte_entropy` does not, and pays for what it cannot foretell. It packs the
    beginning of every tensor, as much of each as makes `SAMPLE_BYTES` of all.

    Example:
        >>> lzma_bits([np.zeros((64, 64), np.float16)]) < 0.1
        True
    """
    whole = sum(tensor.nbytes for tensor in tensors)
    part = min(1.0, SAMPLE_BYTES / whole) if whole else 0.0
    weights = packed = 0
    for tensor in tensors:
        head = np.ascontiguousarray(tensor).reshape(-1)[: ceil(part * tensor.size)]
        # A two-byte weight's bytes are unlike: the packer is told where in the weight it is.
        wide = int(tensor.itemsize == 2)
        own = {"id": lzma.FILTER_LZMA2, "preset": 6, "lp": wide, "pb": wide}
        weights += head.size
        packed += len(lzma.compress(head.tobytes(), format=lzma.FORMAT_RAW, filters=[own]))
    return 8 * packed / weights if weights else 0.0
