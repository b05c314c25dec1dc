"""Sparsity for PyTorch: make weights zero where it costs least, and keep them zero."""

from slimkit.core.sparse import SparseConfig
from slimkit.sparse.checkpoint import sparsify_checkpoint
from slimkit.sparse.compressor import Compressor
from slimkit.sparse.zeros import FrozenZeros, freeze_zeros

__all__ = ["Compressor", "FrozenZeros", "SparseConfig", "freeze_zeros", "sparsify_checkpoint"]
