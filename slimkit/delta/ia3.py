"""IA3 on a torch layer: a trained factor for each output, or each input, merged into the weight when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit import bridge, kinds
from slimkit.core.delta.ia3 import along, weight_axis
from slimkit.delta.layer import Adapted, AdaptedMerging
from slimkit.sharded import beside

import torch
from torch import nn

__all__ = ["Factors", "Scaled", "bridge"]


class Factors(nn.Module):
    """Factors of the channels of a tensor, (width,); they start at one."""

    def __init__(self, width: int, dtype: torch.dtype, feedforward: bool = False) -> None:
        super().__init__()
        self.mindpet_delta_ia3_l = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """x with each channel times its factor, in the dtype of x."""
        factors = self.mindpet_delta_ia3_l.to(x.device)
        return (x * factors.view(along(axis % x.ndim, x.ndim))).to(x.dtype)


class Scaled(AdaptedMerging):
    """A linear layer or convolution with IA3: l * (W x + b), or W (l * x) + b where the inputs have the factors."""

    delta_kind = "ia3"
    word = "Scaled"

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> int:
        """As many factors as the layer has outputs or inputs."""
        return int(layer.weight.shape[weight_axis(options["feedforward"], _is_transposed(layer))])

    @property
    def scales_inputs(self) -> bool:
        """Whether it is the inputs that have the factors."""
        return bool(next(iter(self.delta_specs.values()))["feedforward"])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, Scaled):  # somebody kept this method, and the delta is off
            return type(self).forward(self, input)
        if not self.delta_acts:
            return super(Adapted, self).forward(input)  # type: ignore[misc]
        return self.acted(super(Adapted, self).forward(*self.taken((input,))))  # type: ignore[misc]

    def taken(self, args: Any) -> Any:
        """The input with its factors, where it has them."""
        if not self.scales_inputs:
            return args
        return (self.adapter(args[0], self._channels), *args[1:])

    def acted(self, out: torch.Tensor, x: Any = None, low: Any = None) -> torch.Tensor:
        """The plain layer's output with its factors, where it has them."""
        scaled: torch.Tensor = out if self.scales_inputs else self.adapter(out, self._channels)
        return scaled

    @property
    def _channels(self) -> int:
        return -3 if self.weight.ndim == 4 else -1

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with the factors in it, in its own dtype; computed in float32 or wider."""
        self.refuse_absent()
        if not self.delta_acts:
            return self.copy_weight()
        axis = weight_axis(self.scales_inputs, _is_transposed(self))
        return self._times(self.weight, axis)

    def _times(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        factors = self.adapter.mindpet_delta_ia3_l.detach().to(wide.device, wide.dtype)
        return (wide * beside(factors.view(along(axis, wide.ndim)), wide)).to(tensor.dtype)

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of; the bias too, where it has factors."""
        bias = None if self.scales_inputs else self.bias
        return super().sources() | ({} if bias is None else {"bias": bias})

    def write_weight(self, value: torch.Tensor) -> None:
        """Give the weight these values, and the bias its factors, in place."""
        super().write_weight(value)
        if "bias" in self.sources() and self.delta_acts:
            self.write(self.bias, self._times(self.bias, 0))


def _is_transposed(layer: nn.Module) -> bool:
    family = kinds.kind_of(layer)
    return family is not None and bool(family.in_out)
