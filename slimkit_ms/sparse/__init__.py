"""Sparsity for MindSpore: make weights zero where it costs least, and keep them zero."""

from slimkit.core.sparse import SparseConfig
from slimkit_ms.sparse.compressor import Compressor
from slimkit_ms.sparse.zeros import FrozenZeros, freeze_zeros

__all__ = ["Compressor", "FrozenZeros", "SparseConfig", "freeze_zeros"]
