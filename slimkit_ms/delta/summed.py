"""A linear layer whose one delta is a change of its weight, so that it merges."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from slimkit_ms import bridge, kinds
from slimkit_ms.delta.attach import forget
from slimkit_ms.delta.layer import AdaptedMerging

from mindspore import ops

__all__ = ["Summed", "bridge"]


class Summed(AdaptedMerging):
    """A linear layer with x (W + change)' + bias; the kinds say what the change is.

    An activation that an `nn.Dense` applies itself comes after the delta.
    """

    def carry_delta(self, options: dict[str, Any], name: str = "default") -> None:
        """Note the delta's name and options; it acts."""
        super().carry_delta(options, name)
        # Of nn.Dense; the plain construct would apply it before the delta comes in.
        self.own_activation = kinds.activation_of(self)

    @abstractmethod
    def change(self) -> Any:
        """(outputs, inputs) that the delta adds to the weight, as NumPy."""

    def leave(self) -> None:
        """Take the delta off, in place."""
        super().leave()
        forget(self, "own_activation")

    def construct(self, x: Any) -> Any:
        if not self.delta_acts:
            return self.plain_construct(x)
        flat = x.reshape((-1, x.shape[-1]))
        out = ops.matmul(flat, ops.cast(self.weight, x.dtype).swapaxes(0, 1))
        if self.bias is not None:
            out = out + ops.cast(self.bias, x.dtype)
        out = out + ops.cast(self.side(flat), out.dtype)
        if self.own_activation is not None:
            out = self.own_activation(out)
        return out.reshape(x.shape[:-1] + (out.shape[-1],))

    @abstractmethod
    def side(self, x: Any) -> Any:
        """(n, outputs) that the delta adds for (n, inputs)."""

    def merged_weight(self) -> Any:
        """The weight with the change in it, in its own dtype; computed in float32."""
        base = bridge.as_numpy(self.weight)
        if not any(self.active_deltas.values()):
            return base
        return (base.astype(np.float32) + self.change()).astype(base.dtype)
