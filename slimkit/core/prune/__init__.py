"""Structural pruning without a framework: graph, dimension algebra, importance, allocation, plan."""
