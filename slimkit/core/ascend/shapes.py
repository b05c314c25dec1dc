"""Shapes of the values in an ONNX graph, by ONNX's own rules; shape tensors are followed with NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = tuple[int | None, ...]

# Shape tensors have a handful of entries; anything longer is data.
_LIMIT = 1024
# What a damaged graph makes the rules below raise; the value's shape stays open then.
_WRONG = (ValueError, IndexError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError)


def infer(onnx: Any, model: Any, needed: Sequence[str]) -> dict[str, Shape]:
    """The shapes of all values, as far as they follow from the operators.

    ONNX's own option to follow shape tensors (`data_prop`) knows few operators, and never ends on some damaged files.

    Args:
        onnx: the module.
        model: a ModelProto without large weights.
        needed: values worth a second, thorough pass when the first leaves them open.

    Returns:
        value -> shape, None for an open axis.
    """
    try:
        found = _shapes(onnx.shape_inference.infer_shapes(model, strict_mode=False).graph)
    except (onnx.shape_inference.InferenceError, *_WRONG):
        # Unknown shapes cost the multiply-accumulate counts and nothing else.
        found = _shapes(model.graph)
    if any(None in found.get(name, (None,)) for name in needed):
        walked = _Walk(onnx, model).run()
        found.update({name: shape for name, shape in walked.items() if None not in shape})
    return found


class _Walk:
    """One pass over the nodes that computes shape tensors as it meets them."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.graph = onnx, model.graph
        self.refusals = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, onnx.defs.SchemaError)
        self.opsets = list(model.opset_import)
        self.version = next((int(o.version) for o in self.opsets if o.domain in ("", "ai.onnx")), 1)
        self.types: dict[str, Any] = {i.name: i.type for i in self.graph.input}
        self.values: dict[str, Array] = {}
        for tensor in self.graph.initializer:
            self.keep(tensor.name, tensor)

    def keep(self, name: str, tensor: Any) -> None:
        self.types[name] = self.onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        if math.prod(tensor.dims) <= _LIMIT:
            try:
                self.values[name] = self.onnx.numpy_helper.to_array(tensor)
            except _WRONG:
                return

    def run(self) -> dict[str, Shape]:
        for node in self.graph.node:
            try:
                self.step(node)
            except (*self.refusals, *_WRONG):
                continue
        return {name: shape for name, kind in self.types.items() if (shape := _shape_of(kind)) is not None}

    def step(self, node: Any) -> None:
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            self.keep(node.output[0], attributes["value"])
            return
        value = self.folded(node, attributes)
        if value is not None and value.size <= _LIMIT:
            self.keep(node.output[0], self.onnx.numpy_helper.from_array(np.asarray(value, order="C")))
            return
        schema = self.onnx.defs.get_schema(node.op_type, self.version, "" if node.domain == "ai.onnx" else node.domain)
        given = {n: self.types[n] for n in node.input if n in self.types}
        known = {n: self.onnx.numpy_helper.from_array(self.values[n]) for n in node.input if n in self.values}
        found = self.onnx.shape_inference.infer_node_outputs(schema, node, given, known, opset_imports=self.opsets)
        self.types.update(found)

    def folded(self, node: Any, attributes: Mapping[str, Any]) -> Array | None:
        """The value of a node whose inputs are all known, or that asks for a known shape."""
        if node.op_type == "Shape":
            shape = _shape_of(self.types.get(node.input[0]))
            if shape is None or None in shape:
                return None
            return np.array(shape, np.int64)[slice(attributes.get("start", 0), attributes.get("end"))]
        if node.op_type not in _FOLD or not all(n in self.values for n in node.input if n):
            return None
        inputs = [self.values[n] if n else None for n in node.input]
        if node.op_type == "Cast":
            kind = self.onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])
            return np.asarray(inputs[0]).astype(kind)
        return np.asarray(_FOLD[node.op_type](attributes, *inputs))


def _whole(a: Array, b: Array) -> Array:
    """ONNX divides whole numbers towards zero; NumPy would give floats, or round down."""
    return np.trunc(a / b).astype(a.dtype)


def _axes(attributes: Mapping[str, Any], axes: Array | None) -> tuple[int, ...] | None:
    found = attributes.get("axes") if axes is None else axes.tolist()
    return None if found is None else tuple(int(a) for a in found)


def _slice(attributes: Mapping[str, Any], x: Array, *parts: Array | None) -> Array:
    given: list[Any] = [None if p is None else p.tolist() for p in parts]
    starts, ends, axes, steps = [*given, None, None, None, None][:4]
    starts, ends = starts or attributes["starts"], ends or attributes["ends"]
    axes = axes or attributes.get("axes") or range(len(starts))
    place = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts)):
        place[axis] = slice(start, end if step > 0 or end > -(2**31) else None, step)
    return x[tuple(place)]


def _reshape(_: Mapping[str, Any], x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


# What exporters compute shapes with. Results stay as small as their inputs, whatever a file says.
_FOLD: dict[str, Callable[..., Any]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: _whole(a, b) if a.dtype.kind in "iu" else a / b,
    "Mod": lambda _, a, b: np.mod(a, b),
    "Min": lambda _, *a: np.minimum.reduce(a),
    "Max": lambda _, *a: np.maximum.reduce(a),
    "Neg": lambda _, a: -a,
    "Sqrt": lambda _, a: np.sqrt(a),
    "Floor": lambda _, a: np.floor(a),
    "Ceil": lambda _, a: np.ceil(a),
    "Equal": lambda _, a, b: a == b,
    "Where": lambda _, c, a, b: np.where(c, a, b),
    "Identity": lambda _, a: a,
    "Cast": lambda _, a: a,
    "ReduceProd": lambda at, a, axes=None: a.prod(axis=_axes(at, axes), keepdims=bool(at.get("keepdims", 1))),
    "Gather": lambda at, a, i: np.take(a, i, axis=at.get("axis", 0)),
    "Concat": lambda at, *a: np.concatenate(a, axis=at["axis"]),
    "Squeeze": lambda at, a, axes=None: np.squeeze(a, _axes(at, axes)),
    "Unsqueeze": lambda at, a, axes=None: np.expand_dims(a, _axes(at, axes) or ()),
    "Reshape": _reshape,
    "Slice": _slice,
}


def _shape_of(kind: Any) -> Shape | None:
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim)


def _shapes(graph: Any) -> dict[str, Shape]:
    infos = (*graph.value_info, *graph.output, *graph.input)
    return {info.name: shape for info in infos if (shape := _shape_of(info.type)) is not None}
