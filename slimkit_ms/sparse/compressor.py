"""The Compressor of MindSpore cells."""

from __future__ import annotations

from typing import Any

from slimkit.core.sparse.compress import BaseCompressor
from slimkit.core.sparse.framework import SparseFramework
from slimkit_ms import bridge
from slimkit_ms.sparse.framework import MindSporeSparse


class Compressor(BaseCompressor):
    __doc__ = BaseCompressor.__doc__

    def _ask(self, model: Any) -> SparseFramework:
        return MindSporeSparse(bridge.check_model(model))
