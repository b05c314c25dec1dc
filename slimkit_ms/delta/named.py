"""Named LoRAs on one MindSpore layer: their tensors, and what they add to the weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.delta import rest
from slimkit.core.delta.named import LORA_BOOK, MergingFace, NamedLoras, Part
from slimkit.core.delta.rest import PARTS
from slimkit.core.delta.spec import LoraSpec, key
from slimkit_ms import bridge
from slimkit_ms.delta import initial, merged
from slimkit_ms.delta.attach import DeltaLayer, forget

import mindspore as ms
from mindspore import ops

__all__ = ["LoraLayer", "MergingLayer", "bridge"]


class MergingLayer(MergingFace, DeltaLayer):
    """A layer with a weight that deltas can be merged into: its tensors."""

    def add_flags_recursive(self, **flags: Any) -> Any:
        """As every cell; `set_train` comes this way."""
        done = super().add_flags_recursive(**flags)  # type: ignore[misc]
        merged.look(self)
        return done

    def copy_weight(self) -> Any:
        """A copy of the weight that shares nothing with it."""
        return bridge.as_numpy(self.weight)

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of."""
        return {"weight": self.weight}

    def copy_of(self, tensor: Any) -> Any:
        """A copy of a tensor that shares nothing with it."""
        return bridge.as_numpy(tensor)

    def sample_of(self, tensor: Any) -> list[float]:
        """Some 64 of a tensor's values."""
        flat = bridge.as_numpy(tensor).reshape(-1)
        found: list[float] = flat[:: max(1, len(flat) // 64)].astype("float32").tolist()
        return found

    def write(self, tensor: Any, value: Any) -> None:
        """Overwrite a tensor's values, in place."""
        tensor.set_data(ms.Tensor(value, tensor.dtype))

    def write_weight(self, value: Any) -> None:
        """Give the weight these values, in place."""
        self.write(self.weight, value)


class LoraLayer(NamedLoras, MergingLayer):
    """Named LoRAs on one layer with a weight."""

    word = "LoRA"
    # What `refresh` works out for the construct, beside the parameters.
    worked_out: tuple[str, ...] = (
        "n_active",
        "part_a",
        "part_b",
        "part_scales",
        "part_rates",
        "part_turns",
        "part_lengths",
        "part_biases",
        "part_rests",
        "part_shares",
        "rest_first",
        "rest_second",
        "rest_shape",
        "sign_table",
    )

    def refresh(self) -> None:
        """Work out once what the construct would otherwise ask on every call."""
        super().refresh()
        # Graph mode reads plain lists of names and numbers where PyNative could read the records themselves.
        parts = self._running
        self.n_active = len(parts)
        self.part_a, self.part_b = [p.a for p in parts], [p.b for p in parts]
        self.part_scales, self.part_rates = [p.scale for p in parts], [p.dropout for p in parts]
        # DoRA's weight beside others, where a delta is one: 0 says that it is plain.
        self.part_turns = [self.active_deltas[p.name] if self.delta_specs[p.name].dora else 0.0 for p in parts]
        self.part_lengths = [key("lora", "magnitude", p.name) for p in parts]
        self.part_biases = [key("lora", "bias", p.name) if self.delta_specs[p.name].bias else "" for p in parts]

        self.part_rests = [self.delta_specs[p.name].rest for p in parts]
        self.part_shares = [self.active_deltas[p.name] for p in parts]
        self.rest_first, self.rest_second = ([key("lora", part, p.name) for p in parts] for part in PARTS["signs"])
        self.rest_shape = tuple(self.weight.shape)
        if any(self.part_rests):
            self.sign_table = ms.Tensor(rest.sign_table())

    def halves(self, i: int, kind: Any) -> tuple[Any, Any]:
        """a and b of the i-th active delta; those that a file holds in fewer bits are computed with in `kind`."""
        a, b = getattr(self, self.part_a[i]), getattr(self, self.part_b[i])
        if a.dtype != ms.float32:
            a, b = ops.cast(a, kind), ops.cast(b, kind)
        return a, b

    def rest(self, i: int) -> Any:
        """What the i-th active delta adds beside its low rank, in the weight's layout and float32."""
        first, second = getattr(self, self.rest_first[i]), getattr(self, self.rest_second[i])
        columns = 1
        for size in self.rest_shape[1:]:
            columns = columns * size
        rows = ops.gather(self.sign_table, ops.cast(first, ms.int32), 0).reshape((self.rest_shape[0], -1))
        dense = rows[:, :columns] * ops.expand_dims(second, 1)
        return self.part_shares[i] * dense.reshape(self.rest_shape)

    def leave(self) -> None:
        """Take every delta off, in place."""
        for name in list(self.delta_specs):
            self.drop_delta(name)
        forget(self, *LORA_BOOK, *self.worked_out)

    def dropped(self, i: int, x: Any) -> Any:
        """The input of the i-th active delta, some of it dropped in training at that delta's own rate."""
        if self.part_rates[i] > 0 and self.training:
            return ops.dropout(x, p=self.part_rates[i], training=True)
        return x

    def add(self, name: str, spec: LoraSpec, dtype: Any = None, *, fresh: bool = True, start: Any = None) -> None:
        """Add a delta that changes nothing yet, in place, and make it active.

        Args:
            name: its name.
            spec: its rank, scale and start.
            dtype: of its parameters; None means float32.
            fresh: whether to compute its start; not needed when values are filled in afterwards.
            start: rows that a begins with, (at most rank, inputs); None for those of its spec alone.
        """
        kind = dtype or ms.float32
        a_shape, b_shape = self.shapes(spec.rank)
        a: Any = "zeros"
        b: Any = "zeros"
        if fresh:
            a, b = self.start_of(spec)
        a_key, b_key = key("lora", "a", name), key("lora", "b", name)
        # Looked up by name, the class attribute of another delta must never answer for one that is missing.
        first = initial.parameter(a, a_shape, kind, a_key)
        if start is not None:
            rows = bridge.as_numpy(first.init_data())
            rows[: len(start)] = start
            first = initial.parameter(ms.Tensor(rows), a_shape, kind, a_key)
        self.insert_param_to_cell(a_key, first)
        self.insert_param_to_cell(b_key, initial.parameter(b, b_shape, kind, b_key))
        for half in (a_key, b_key) if spec.rest else ():
            getattr(self, half).requires_grad = False  # a compressed delta is made, not trained
        if spec.init == "pissa":
            for part, source in (("a0", a_key), ("b0", b_key)):
                object.__setattr__(self, key("lora", part, name), ms.Tensor(bridge.as_numpy(getattr(self, source))))
        if spec.dora:
            length = self._lengths(bridge.as_numpy(self.weight).astype(np.float32))
            m_key = key("lora", "magnitude", name)
            self.insert_param_to_cell(m_key, ms.Parameter(ms.Tensor(length, kind), name=m_key))
        if spec.bias:
            s_key = key("lora", "bias", name)
            self.insert_param_to_cell(s_key, initial.parameter("zeros", b_shape[:1], kind, s_key))
        for part, (shape, word) in rest.shapes(spec.rest, tuple(self.weight.shape)).items():
            object.__setattr__(self, key("lora", part, name), ms.Tensor(np.zeros(shape, word)))
        self.take(name, spec)

    def start_of(self, spec: LoraSpec) -> tuple[Any, Any]:
        """What a and b start from: tensors, names or initialisers."""
        if spec.init == "pissa":
            first, second = self._principal(spec)
            return ms.Tensor(first), ms.Tensor(second)
        if spec.init == "gaussian":
            return ms.common.initializer.Normal(1 / spec.rank), "zeros"
        return initial.kaiming(), "zeros"

    def merged_weight(self) -> Any:
        base = bridge.as_numpy(self.weight)
        total = base.astype(np.float32)
        for part in self.active_parts():
            total = total + self.change(part, base.astype(np.float32))
        return total.astype(base.dtype)

    def change(self, part: Part, base: Any) -> Any:
        """What one delta adds to the base weight, in the weight's layout, as NumPy."""
        spec, weight = self.delta_specs[part.name], self.active_deltas[part.name]
        a, b = (bridge.as_numpy(x).astype(np.float32) for x in self._factors(part))
        delta = self.product(a, b)
        if spec.keep_zeros:
            return part.scale * delta * (base != 0)
        if not spec.dora:
            return part.scale * delta + weight * self.rest_values(part.name) if spec.rest else part.scale * delta
        turned = base + spec.scaling * delta
        length = bridge.as_numpy(getattr(self, key("lora", "magnitude", part.name))).astype(np.float32)
        return weight * (self._per_output(length / self._lengths(turned)) * turned - base)

    def rest_values(self, name: str) -> Any:
        """What a compressed delta adds beside its low rank, as NumPy."""
        spec = self.delta_specs[name]
        parts = {p: bridge.as_numpy(getattr(self, key("lora", p, name))) for p in PARTS[spec.rest]}
        return rest.dense(parts, tuple(self.weight.shape))

    def _lengths(self, weight: Any) -> Any:
        return np.linalg.norm(weight, axis=1)

    def _per_output(self, values: Any) -> Any:
        return values[:, None]

    def _factors(self, part: Part) -> tuple[Any, Any]:
        a, b = getattr(self, part.a), getattr(self, part.b)
        if self.delta_specs[part.name].init == "pissa":
            # What PiSSA took out of the base is subtracted here, so the base itself is never touched.
            a = ops.concat((a, getattr(self, key("lora", "a0", part.name))), 0)
            b = ops.concat((b, -getattr(self, key("lora", "b0", part.name))), 1)
        return a, b

    def _principal(self, spec: LoraSpec) -> tuple[Any, Any]:
        """PiSSA's start: scaling * b @ a is the best rank-r approximation of the weight (Meng et al. 2024, sec. 3)."""
        u, s, vt = np.linalg.svd(bridge.as_numpy(self.weight).astype(np.float32), full_matrices=False)
        root = np.sqrt(s[: spec.rank] / spec.scaling)
        return root[:, None] * vt[: spec.rank], u[:, : spec.rank] * root

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, {self.words()}"  # type: ignore[misc]
