"""The Compressor of MindSpore cells."""

from __future__ import annotations

from typing import Any

from slimkit.core.sparse.compress import BaseCompressor
from slimkit.core.sparse.walk import Host
from slimkit_ms import bridge
from slimkit_ms.sparse.host import MindSporeHost


class Compressor(BaseCompressor):
    __doc__ = BaseCompressor.__doc__

    def _ask(self, model: Any) -> Host:
        return MindSporeHost(bridge.check_model(model))
