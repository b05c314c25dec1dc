"""PyTorch's side of the command line's single commands."""

from slimkit.jobs.wing import TorchJobs

__all__ = ["TorchJobs"]
