"""Where the weight of each layer lies in a MindSpore cell: in a cell of its own, or in attention, which reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.sparse.experts import UNCLEAR, Fused, fused
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit_ms import bridge, kinds
from slimkit_ms.trace.spelling import spelled_out

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]

PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class WeightSlot:
    """Where the weight and the bias of a layer lie.

    Args:
        cell: path of the cell that holds the parameters.
        kind: the core's word for the layer.
        key: the weight's name in that cell.
        index: None for the whole parameter, a number for one expert of it, a slice for some of its rows.
        bias_key: the bias's name, None without bias.
        bias_index: the same for the bias.
        part: "" for a cell that is called; else what attention multiplies it with: "query", "key", "value" or "out".
        learn: the layout was guessed; inputs would show.
    """

    cell: str
    kind: str
    key: str = "weight"
    index: int | slice | None = None
    bias_key: str | None = "bias"
    bias_index: int | slice | None = None
    part: str = ""
    learn: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """Which parameter holds the weight: the path it is found at, and its name there."""
        return self.cell, self.key

    @property
    def read(self) -> bool:
        """Whether the weight is read without a call that shows its inputs: only products with it do."""
        return isinstance(self.index, int)

    @property
    def caller(self) -> str:
        """Path of the cell whose call uses the weight."""
        return self.cell.rpartition(".")[0] if self.part == "out" else self.cell

    def parameter(self, model: nn.Cell) -> ms.Parameter:
        """The parameter that holds the weight."""
        return getattr(bridge.get_module(model, self.cell), self.key)

    def bias_parameter(self, model: nn.Cell) -> ms.Parameter | None:
        """The parameter that holds the bias, or None."""
        return getattr(bridge.get_module(model, self.cell), self.bias_key) if self.bias_key else None

    def weight(self, model: nn.Cell) -> Array:
        """The layer's weight in float32."""
        return _values(self.parameter(model), self.index)

    def store(self, model: nn.Cell, weight: Array, bias_shift: Array | None) -> None:
        """Put a weight in place and shift the bias, in the parameters' own dtype."""
        _put(self.parameter(model), self.index, weight)
        bias = self.bias_parameter(model)
        if bias_shift is not None and bias is not None:
            _put(bias, self.bias_index, _values(bias, self.bias_index) + bias_shift)

    def layer(self, name: str, model: nn.Cell) -> SparseLayer:
        """What the core knows of it."""
        cell, shape = bridge.get_module(model, self.cell), tuple(self.parameter(model).shape)
        if self.kind == "conv2d":
            stride, dilation = kinds.steps_of(cell, "stride"), kinds.steps_of(cell, "dilation")
            has_bias = self.bias_key is not None
            return SparseLayer(name, self.kind, shape, kinds.groups_of(cell), stride, dilation, has_bias)
        has_bias = self.bias_key is not None
        if isinstance(self.index, int):
            return SparseLayer(name, self.kind, shape[1:], has_bias=has_bias, family=f"{self.cell}.{self.key}")
        rows = shape[0] if self.index is None else self.index.stop - self.index.start
        return SparseLayer(name, self.kind, (rows, shape[1]), has_bias=has_bias)


def _values(parameter: ms.Parameter, index: int | slice | None) -> Array:
    values: Array = parameter.astype(ms.float32).asnumpy()
    return (values if index is None else values[index]).copy()  # a part of many experts alone


def _put(parameter: ms.Parameter, index: int | slice | None, values: Array) -> None:
    if index is not None:
        whole = _values(parameter, None)
        whole[index] = values
        values = whole
    parameter.set_data(ms.Tensor(np.ascontiguousarray(values, dtype=np.float32)).astype(parameter.dtype))


def sparse_kind(cell: nn.Cell) -> str | None:
    """The core's word for a cell that can be sparse, or None."""
    if kinds.is_ordinary_conv2d(cell) and kinds.padding_mode_of(cell) == "zeros":
        return "conv2d"
    return "linear" if kinds.is_kind(cell, "linear") else None


def slots_of(model: nn.Cell) -> Iterator[tuple[str, WeightSlot]]:
    """Every place of a weight that could be sparse by the layer's name, in the model's order.

    The layers are dense layers, Conv2d, the query, key and value parts of an attention's fused input projection
    ("attn.in_proj_weight[query]"), and each expert of a parameter with three axes ("experts.w[3]").
    """
    attention = {id(c.out_proj) for _, c in model.cells_and_names() if isinstance(c, nn.MultiheadAttention)}
    for path, cell in model.cells_and_names():
        kind = sparse_kind(cell)
        if kind is not None:
            part = "out" if id(cell) in attention else ""
            yield path, WeightSlot(path, kind, bias_key=None if kinds.bias_of(cell) is None else "bias", part=part)
        elif isinstance(cell, nn.MultiheadAttention):
            yield from _projections(path, cell)
        else:
            yield from _experts(path, cell)


def _projections(path: str, cell: nn.MultiheadAttention) -> Iterator[tuple[str, WeightSlot]]:
    stem = f"{path}." if path else ""
    bias = "in_proj_bias" if cell.in_proj_bias is not None else None
    for i, part in enumerate(PARTS):
        n = cell.num_heads * cell.head_dim
        rows = slice(i * n, (i + 1) * n)
        if cell.in_proj_weight is not None:
            name, key, own = f"{stem}in_proj_weight[{part}]", "in_proj_weight", rows
        else:
            key = f"{part[0]}_proj_weight"
            name, own = f"{stem}{key}", None
        yield name, WeightSlot(path, "linear", key, own, bias, rows, part)


def _experts(path: str, cell: nn.Cell) -> Iterator[tuple[str, WeightSlot]]:
    """One slot for each expert of the parameters with three axes of a cell that says that it has experts."""
    own, found = cell._params, _fused(cell)
    stem = f"{path}." if path else ""
    for key in found.keys:
        bias = f"{key}_bias" if own.get(f"{key}_bias") is not None else None
        for i in range(own[key].shape[0]):
            slot = WeightSlot(path, found.kind, key, i, bias, i, learn=not found.told)
            yield f"{stem}{key}[{i}]", slot


def _fused(cell: nn.Cell) -> Fused:
    own = {} if type(cell).__module__.startswith("mindspore.") else cell._params
    return fused(cell, {key: tuple(p.shape) for key, p in own.items() if p is not None})


def unclear(model: nn.Cell) -> dict[str, str]:
    """Parameters that may hold experts, but whose cell does not say so, with that as the reason."""
    return {
        f"{path}.{key}" if path else key: UNCLEAR
        for path, cell in model.cells_and_names()
        for key in _fused(cell).unclear
    }


def parts(slots: Mapping[str, WeightSlot]) -> set[str]:
    """The parameters that hold several layers: fused attention, experts; and attention as a whole."""
    fused = [slot for slot in slots.values() if slot.read or slot.part]
    return {f"{s.cell}.{s.key}" if s.cell else s.key for s in fused} | {s.cell for s in fused}


def own_matrices(model: nn.Cell) -> Iterator[tuple[str, nn.Cell, dict[str, tuple[int, ...]]]]:
    """Every cell with the shapes of its own floating-point parameters, but tables."""
    tables = {id(kinds.weight_of(c)) for _, c in model.cells_and_names() if kinds.is_kind(c, "embedding")}
    for path, cell in model.cells_and_names():
        mine = cell._params.items()
        own = {k: p for k, p in mine if p is not None and id(p) not in tables}
        yield path, cell, {k: tuple(p.shape) for k, p in own.items() if p.is_floating_point()}


def attended(cell: nn.MultiheadAttention, args: Any, kwargs: Any) -> Any:
    """What an attention's call hands to its output projection."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = dict.fromkeys(names) | dict(zip(names, args)) | kwargs
    with spelled_out(cell):
        return cell.mix(*(given[name] for name in ("query", "key", "value", "key_padding_mask", "attn_mask")), True)[0]
