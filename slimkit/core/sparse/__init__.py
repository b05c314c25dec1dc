"""Sparsity: which weights become zero, and what the others become; one text for NumPy and torch arrays."""

from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.methods import METHODS, SparseMethod, register_sparse_method

__all__ = ["METHODS", "SparseConfig", "SparseMethod", "register_sparse_method"]
