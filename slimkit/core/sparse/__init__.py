"""Sparsity: which weights become zero, and what the others become; one text for NumPy and torch arrays."""

from slimkit.core.sparse.config import SparseConfig

__all__ = ["SparseConfig"]
