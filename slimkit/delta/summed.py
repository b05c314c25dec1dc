"""A linear layer whose one delta is a change of its weight, so that it merges."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from slimkit import bridge
from slimkit.delta.layer import Adapted, AdaptedMerging
from slimkit.sharded import beside

import torch
from torch.nn import functional as F

__all__ = ["Summed", "bridge"]


class Summed(AdaptedMerging):
    """A linear layer with x (W + change)' + bias; the kinds say what the change is."""

    reads = ((F.linear, 1, 0),)
    bias: Any

    @abstractmethod
    def change(self) -> torch.Tensor:
        """(outputs, inputs) that the delta adds to the weight."""

    @abstractmethod
    def side(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) that the delta adds for (..., inputs)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, Summed):  # somebody kept this method, and the delta is off
            return type(self).forward(self, input)
        out = super(Adapted, self).forward(input)  # type: ignore[misc]
        return self.acted(out, input) if self.delta_acts else out

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """The plain layer's output with the delta's own."""
        return out + self.side(x).to(out.dtype)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with the change in it, in its own dtype; computed in float32 or wider."""
        self.refuse_absent()
        if not any(self.active_deltas.values()):
            return self.copy_weight()
        wide = self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32))
        total: torch.Tensor = wide + beside(self.change().to(wide.device, wide.dtype), wide)
        return total.to(self.weight.dtype)
