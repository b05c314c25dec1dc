"""The highest point of this process's memory, as the kernel counts it for this program alone.

`getrusage`'s ru_maxrss is no such thing: it passes from a parent through fork and exec, so that a child of a large
process begins with the parent's peak.
"""

import ctypes
from pathlib import Path


def memory_mb(field):
    """VmRSS (now) or VmHWM (the highest so far) in megabytes of 2^20 bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def begin_anew(weights=()):
    """Let VmHWM count from here on; gives what the process holds now.

    Args:
        weights: a model's tensors. They are read first, since a file that is mapped is in memory only once it is read,
            and what was freed before is given back to the system, which the allocator would otherwise hand out again:
            without both, what training adds would be told too high after opening a model, and too low after a start
            that took much memory.
    """
    for tensor in weights:
        tensor.sum()
    if weights:
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")
