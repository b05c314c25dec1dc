"""slimkit for MindSpore: prune, sparsify, distil, adapt, convert and export trained models."""

from slimkit.core import public as _public
from slimkit.core.lazy import door as _door

__version__ = "0.1.0"
__getattr__, __dir__ = _door("slimkit_ms")
__all__ = sorted(_public.homes("slimkit_ms"))  # noqa: PLE0605  # the table is the list
