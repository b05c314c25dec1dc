"""A dense layer with LoRA whose own weight is held in int8 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.delta.bundle import sample_places
from slimkit.core.delta.held_base import quantised, restored
from slimkit_ms import bridge, kinds
from slimkit_ms.delta.attach import forget
from slimkit_ms.delta.lora_layers import LoraLinear

import mindspore as ms
from mindspore import ops

__all__ = ["HeldLora", "bridge"]

_BOOK = ("plain_dtype", "plain_trains", "plain_name", "plain_sample", "held_kind", "held_scaled", "own_activation")


class HeldLora(LoraLinear):
    """A dense layer with LoRA; `weight_held` and `weight_scale` stand for its weight until the deltas leave.

    While deltas are merged, `weight_held` is wide and has no scale.
    """

    word = "HeldLoRA"

    @property
    def weight(self) -> Any:
        """The weight that the layer computes with, in the type that it had; made anew unless deltas are merged."""
        if "weight_held" not in self._params:
            return self._params["weight"]
        if self.held_kind and self.unmerged is None:
            return ms.Tensor(self._wide(), self.plain_dtype)
        return self.weight_held

    def hold(self, kind: str) -> None:
        """Hold the weight in fewer bits, in place."""
        weight = self._params["weight"]
        values = bridge.as_numpy(weight).astype(np.float32)
        self.plain_dtype, self.plain_trains, self.plain_name = weight.dtype, weight.requires_grad, weight.name
        self.plain_sample = values.reshape(-1)[sample_places(values.size)]
        self.held_kind, self.held_scaled = kind, kind == "int8"
        # Of nn.Dense; it comes after the deltas.
        self.own_activation = kinds.activation_of(self)
        held: Any = ms.Tensor(values).astype(ms.bfloat16)
        scale = np.ones(len(values), np.float32)
        if kind == "int8":
            numbers, scale = quantised(values)
            held = ms.Tensor(numbers)
        del self._params["weight"]
        self._hold(held)
        # A parameter, so that it is saved with the cell.
        name = self.plain_name.removesuffix("weight") + "weight_scale"
        self.insert_param_to_cell("weight_scale", ms.Parameter(ms.Tensor(scale), name=name, requires_grad=False))

    def _hold(self, held: Any) -> None:
        self._params.pop("weight_held", None)
        name = self.plain_name.removesuffix("weight") + "weight_held"
        self.insert_param_to_cell("weight_held", ms.Parameter(held, name=name, requires_grad=False), False)

    def _wide(self) -> Any:
        held = bridge.as_numpy(self.weight_held.astype(ms.float32))
        return restored(held, bridge.as_numpy(self.weight_scale)) if self.held_scaled else held

    def construct(self, x: Any) -> Any:
        flat = x.reshape((-1, x.shape[-1]))
        if self.held_scaled and x.dtype == ms.float16:
            # Whole numbers up to 127 would lead beyond float16's range, and a gradient times a scale below it.
            wide = ops.cast(self.weight_held, ms.float32) * self.weight_scale.reshape((-1, 1))
            out = ops.matmul(flat, ops.cast(wide, x.dtype).swapaxes(0, 1))
        else:
            out = ops.matmul(flat, ops.cast(self.weight_held, x.dtype).swapaxes(0, 1))
            if self.held_scaled:
                out = ops.cast(out * self.weight_scale, x.dtype)
        if self.bias is not None:
            out = out + ops.cast(self.bias, x.dtype)
        out = self.with_deltas(out, flat, x.dtype)
        if self.own_activation is not None:
            out = self.own_activation(out)
        return out.reshape(x.shape[:-1] + (out.shape[-1],))

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of."""
        return {"weight_held": self.weight_held}

    def copy_weight(self) -> Any:
        """A copy of the weight that shares nothing with it."""
        return self._wide()

    def copy_of(self, tensor: Any) -> Any:
        """A copy of a tensor that shares nothing with it; what NumPy lacks stays a tensor."""
        return tensor.copy() if tensor.dtype == ms.bfloat16 else super().copy_of(tensor)

    def sample_of(self, tensor: Any) -> list[float]:
        """Some 64 of a tensor's values."""
        return super().sample_of(tensor.astype(ms.float32))

    def merged_weight(self) -> Any:
        """The weight with every active delta in it, in the type that it had; computed in float32."""
        base = self._wide()
        for part in self.active_parts():
            base = base + self.change(part, base)
        return ms.Tensor(base, self.plain_dtype)

    def write_weight(self, value: Any) -> None:
        """Let the layer have a wide weight with these values, in place."""
        self._hold(value)
        self.held_scaled = False

    def _write_sources(self, values: dict[str, Any]) -> None:
        value = values["weight_held"]
        self._hold(value if isinstance(value, ms.Tensor) else ms.Tensor(value))
        self.held_scaled = self.held_kind == "int8"

    def keep_merged_deltas(self) -> None:
        """Let the weight be what it is now, in place: the deltas are not merged."""
        self.held_kind = self.held_kind if self._is_held() else ""
        super().keep_merged_deltas()

    def _is_held(self) -> bool:
        return self.weight_held.dtype != self.plain_dtype

    def leave(self) -> None:
        """Take every delta off, in place; the weight stays what the layer computed with, in the type that it had."""
        wide = self.weight_held if not self._is_held() else ms.Tensor(self._wide(), self.plain_dtype)
        super().leave()
        weight = ms.Parameter(ms.Tensor(wide), name=self.plain_name, requires_grad=self.plain_trains)
        del self._params["weight_held"]
        self._params["weight"] = weight
        forget(self, *_BOOK, "weight_scale")
