"""Sparsity for MindSpore: make weights zero where it costs least, and keep them zero."""

from slimkit.core.sparse import SparseConfig, SparseMethod, register_sparse_method
from slimkit.core.sparse.maths.solvers import SparseProblem
from slimkit_ms.sparse.checkpoint import sparsify_checkpoint
from slimkit_ms.sparse.compressor import Compressor
from slimkit_ms.sparse.zeros import FrozenZeros, freeze_zeros

__all__ = [
    "Compressor",
    "FrozenZeros",
    "SparseConfig",
    "SparseMethod",
    "SparseProblem",
    "freeze_zeros",
    "register_sparse_method",
    "sparsify_checkpoint",
]
