"""The Compressor of PyTorch models."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core.sparse.compress import BaseCompressor
from slimkit.core.sparse.walk import Host
from slimkit.sparse.host import TorchHost


class Compressor(BaseCompressor):
    __doc__ = BaseCompressor.__doc__

    def _ask(self, model: Any) -> Host:
        return TorchHost(bridge.refuse_offloaded(bridge.check_model(model)))
