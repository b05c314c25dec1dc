"""SHiRA on a torch layer: a few entries of the weight train, at places chosen once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core.delta.shira import INDEX, ShiraSpec, chosen, refuse_index
from slimkit.core.errors import UnsupportedError
from slimkit.delta.fused import computing, fuses
from slimkit.delta.summed import Summed

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Entries", "EntryValues", "bridge"]


class _EntryLinear(torch.autograd.Function):
    """y = x (W with values added at some places)' + bias; the sum is made anew each way and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, values: Any, index: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight, values, index)
        return F.linear(x, _summed(weight, values, index), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, weight, values, index = ctx.saved_tensors
        need_x, need_weight, need_bias, need_values, _ = ctx.needs_input_grad
        g = grads[0].reshape(-1, grads[0].shape[-1])  # (n, out)
        g_x = g_weight = g_bias = g_values = None
        if need_x:
            g_x = (g @ _summed(weight, values, index)).view(*grads[0].shape[:-1], x.shape[-1])
        if need_weight or need_values:
            # All of it is made: picking rows and columns for each entry costs more than one product.
            g_weight = g.t() @ x.reshape(-1, x.shape[-1])
            g_values = g_weight.reshape(-1)[index]
        if need_bias:
            g_bias = g.sum(0)
        return g_x, g_weight if need_weight else None, g_bias, g_values, None


def _summed(weight: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1).index_add(0, index, values).view_as(weight)


class EntryValues(nn.Module):
    """What is added to some entries of a weight, and their flat indices; the values start at zero."""

    mindpet_delta_shira_index: torch.Tensor

    def __init__(self, index: Any, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.mindpet_delta_shira_values = nn.Parameter(torch.zeros(len(index), dtype=dtype))
        self.register_buffer("mindpet_delta_shira_index", torch.from_numpy(index))


class Entries(Summed):
    """A linear layer with SHiRA."""

    delta_kind = "shira"
    word = "Entries"

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> Any:
        """The entries that train; those of a file are filled in afterwards."""
        weight = layer.weight
        if bridge.is_distributed(weight):
            raise UnsupportedError("shira goes on whole weights; put it on before the model is sharded.")
        if options["count"]:
            return np.zeros(options["count"], np.int32)
        if weight.is_meta:
            raise UnsupportedError("shira chooses its entries by the weight, which is not in memory (offloaded).")
        return chosen(weight.detach().float().cpu().numpy(), ShiraSpec(**options))

    def carry_delta(self, options: dict[str, Any], name: str = "default") -> None:
        """Note the delta's name and options, with how many entries there are; it acts."""
        super().carry_delta({**options, "count": len(self.adapter.mindpet_delta_shira_index)}, name)

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> values and indices."""
        return {f"mindpet_delta_shira.{n}": t for n, t in self.adapter.state_dict(keep_vars=True).items()}

    def refuse_values(self, parts: Mapping[str, Any], where: str) -> None:
        """Refuse indices that are no places of the weight in rising order."""
        refuse_index(parts[INDEX], math.prod(self.weight.shape), INDEX, where)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self, Entries):
            return type(self).forward(self, input)
        values, index = self._values_and_index()
        # In halves the sum would lose what is small beside the weight.
        if self.delta_acts and self.weight.dtype.itemsize >= 4 and values.device == self.weight.device:
            if fuses(input, self.weight, values) and not torch.compiler.is_compiling():
                return _EntryLinear.apply(input, self.weight, self.bias, values, index)
            if input.dtype == self.weight.dtype == values.dtype:
                return F.linear(input, _summed(self.weight, values, index), self.bias)
        return super().forward(input)

    def side(self, x: torch.Tensor) -> torch.Tensor:
        """(..., outputs) that the delta adds for (..., inputs)."""
        kind = computing(x.dtype, self.adapter.mindpet_delta_shira_values.dtype)
        return F.linear(x.to(kind), self.change().to(x.device, kind))

    def change(self) -> torch.Tensor:
        """(outputs, inputs): the values at their places, zero elsewhere."""
        values, index = self._values_and_index()
        return _summed(values.new_zeros(tuple(self.weight.shape)), values, index)

    def _values_and_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        adapter: Any = self.adapter
        return adapter.mindpet_delta_shira_values, adapter.mindpet_delta_shira_index
