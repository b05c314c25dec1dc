"""IA3 on a MindSpore layer: a trained factor for each output, or each input, merged into the weight when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.delta.ia3 import along, weight_axis
from slimkit.core.errors import UnsupportedError
from slimkit_ms import bridge, kinds
from slimkit_ms.delta.attach import forget
from slimkit_ms.delta.layer import AdaptedMerging

import mindspore as ms
from mindspore import nn, ops

__all__ = ["Factors", "Scaled", "bridge"]


class Factors(nn.Cell):
    """Factors of the channels of a tensor, (width,); they start at one."""

    def __init__(self, width: int, dtype: Any, feedforward: bool = False) -> None:
        super().__init__()
        self.mindpet_delta_ia3_l = ms.Parameter(ops.ones((width,), dtype), name="mindpet_delta_ia3_l")

    def construct(self, x: Any, shape: Any) -> Any:
        """x with each channel times its factor, in the dtype of x."""
        return ops.cast(x * self.mindpet_delta_ia3_l.reshape(shape), x.dtype)


class Scaled(AdaptedMerging):
    """A dense layer or convolution with IA3: l * (W x + b), or W (l * x) + b where the inputs have the factors."""

    delta_kind = "ia3"
    word = "Scaled"

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> int:
        """As many factors as the layer has outputs or inputs."""
        if not options["feedforward"] and kinds.activation_of(layer) is not None:
            raise UnsupportedError(
                "ia3 multiplies outputs before the activation, which this nn.Dense applies itself; put the activation "
                "into a cell of its own, or name the layer in feedforward."
            )
        return int(layer.weight.shape[weight_axis(options["feedforward"], False)])

    def carry_delta(self, options: dict[str, Any], name: str = "default") -> None:
        """Note the delta's name and options; it acts."""
        super().carry_delta(options, name)
        self.scales_inputs = bool(options["feedforward"])
        # Channels come last, in a convolution first after the batch.
        self.factor_shape = (1, -1, 1, 1) if self.weight.ndim == 4 else (-1,)

    def leave(self) -> None:
        """Take the factors off, in place."""
        super().leave()
        forget(self, "scales_inputs", "factor_shape")

    def construct(self, x: Any) -> Any:
        if not self.delta_acts:
            return self.plain_construct(x)
        if self.scales_inputs:
            return self.plain_construct(self.mindpet_delta_ia3(x, self.factor_shape))
        return self.mindpet_delta_ia3(self.plain_construct(x), self.factor_shape)

    def merged_weight(self) -> Any:
        """The weight with the factors in it, in its own dtype; computed in float32."""
        if not self.delta_acts:
            return self.copy_weight()
        return self._times(self.weight, weight_axis(self.scales_inputs, False))

    def _times(self, tensor: Any, axis: int) -> Any:
        values = bridge.as_numpy(tensor)
        factors = bridge.as_numpy(self.adapter.mindpet_delta_ia3_l).astype(np.float32)
        return (values.astype(np.float32) * factors.reshape(along(axis, values.ndim))).astype(values.dtype)

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of; the bias too, where it has factors."""
        bias = None if self.scales_inputs else self._params.get("bias")
        return super().sources() | ({} if bias is None else {"bias": bias})

    def write_weight(self, value: Any) -> None:
        """Give the weight these values, and the bias its factors, in place."""
        super().write_weight(value)
        if "bias" in self.sources() and self.delta_acts:
            self.write(self.bias, self._times(self.bias, 0))
