"""PyTorch's side of the command line's single commands."""

from slimkit.jobs.ship import measure, write
from slimkit.jobs.shrink import plan_sparsify, prune, sparsify
from slimkit.jobs.teach import adapt, distill

__all__ = ["adapt", "distill", "measure", "plan_sparsify", "prune", "sparsify", "write"]
