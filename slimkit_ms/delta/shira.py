"""SHiRA on a MindSpore layer: a few entries of the weight train, at places chosen once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.delta.shira import INDEX, ShiraSpec, chosen, refuse_index, weight_change
from slimkit_ms import bridge
from slimkit_ms.delta.attach import forget
from slimkit_ms.delta.summed import Summed

import mindspore as ms
from mindspore import nn, ops

__all__ = ["Entries", "EntryValues", "bridge"]


class EntryValues(nn.Cell):
    """What is added to some entries of a weight, and their flat indices; the values start at zero."""

    def __init__(self, index: Any, dtype: Any, **options: Any) -> None:
        super().__init__()
        name = "mindpet_delta_shira_values"
        self.mindpet_delta_shira_values = ms.Parameter(ops.zeros((len(index),), dtype), name=name)
        place = "mindpet_delta_shira_index"  # a parameter, so that it is saved with the cell
        self.mindpet_delta_shira_index = ms.Parameter(ms.Tensor(index), name=place, requires_grad=False)


class Entries(Summed):
    """A dense layer with SHiRA."""

    delta_kind = "shira"
    word = "Entries"

    @classmethod
    def width_for(cls, layer: Any, options: Mapping[str, Any]) -> Any:
        """The entries that train; those of a file are filled in afterwards."""
        if options["count"]:
            return np.zeros(options["count"], np.int32)
        return chosen(bridge.as_numpy(layer.weight).astype(np.float32), ShiraSpec(**options))

    def carry_delta(self, options: dict[str, Any], name: str = "default") -> None:
        """Note the delta's name and options, with how many entries there are; it acts."""
        self.entry_shape = tuple(self.weight.shape)
        super().carry_delta({**options, "count": len(self.adapter.mindpet_delta_shira_values)}, name)

    def leave(self) -> None:
        """Take the delta off, in place."""
        super().leave()
        forget(self, "entry_shape")

    def refuse_values(self, parts: Mapping[str, Any], where: str) -> None:
        """Refuse indices that are no places of the weight in rising order."""
        refuse_index(parts[INDEX], math.prod(self.weight.shape), INDEX, where)

    def side(self, x: Any) -> Any:
        """(n, outputs) that the delta adds for (n, inputs)."""
        values = self.mindpet_delta_shira.mindpet_delta_shira_values
        places = ops.expand_dims(self.mindpet_delta_shira.mindpet_delta_shira_index, 1)
        empty = ops.zeros((self.entry_shape[0] * self.entry_shape[1],), values.dtype)
        change = ops.tensor_scatter_add(empty, places, values).reshape(self.entry_shape)
        return ops.matmul(x, ops.cast(change, x.dtype).swapaxes(0, 1))

    def change(self) -> Any:
        """(outputs, inputs): the values at their places, zero elsewhere."""
        values = bridge.as_numpy(self.adapter.mindpet_delta_shira_values).astype(np.float32)
        index = bridge.as_numpy(self.adapter.mindpet_delta_shira_index)
        return weight_change(values, index, tuple(self.weight.shape))
