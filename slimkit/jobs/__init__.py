"""PyTorch's side of the command line's single commands."""

from slimkit.jobs.framework import TorchJobs

__all__ = ["TorchJobs"]
