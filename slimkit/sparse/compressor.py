"""The Compressor of PyTorch models."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.sparse.compress import BaseCompressor
from slimkit.core.sparse.framework import SparseFramework
from slimkit.sparse.framework import TorchSparse


class Compressor(BaseCompressor):
    __doc__ = BaseCompressor.__doc__

    def _ask(self, model: Any) -> SparseFramework:
        return TorchSparse(bridge.refuse_offloaded(bridge.check_whole(model)))
