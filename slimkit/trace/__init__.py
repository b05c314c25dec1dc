"""A torch model as a neutral graph: one forward pass on shapes alone, watched operator by operator."""

from slimkit.trace.passes import Trace, trace

__all__ = ["Trace", "trace"]
