"""Transformer weight pruning without a framework: which blocks, heads and channels stay, and the slices."""
