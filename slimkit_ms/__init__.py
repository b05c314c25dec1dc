"""slimkit for MindSpore: prune, sparsify, distil, adapt, convert and export trained models."""

from slimkit.core.lazy import door as _door

__version__ = "0.1.0"
__getattr__, __dir__ = _door("slimkit_ms")
