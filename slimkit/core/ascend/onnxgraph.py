"""Reading an ONNX file of unknown origin into plain facts: damaged or dishonest files end in FileFormatError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.ascend.shapes import Shape, infer
from slimkit.core.errors import FileFormatError
from slimkit.core.lazy import library

Array = np.ndarray[Any, Any]

# Protocol buffers hold less than 2 GiB; a larger file cannot be an ONNX model.
LIMIT_BYTES = 2**31

# Operators whose rows a check counts.
_MULTIPLIERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")

# Bytes of one entry, for the types whose entries are whole bytes.
_ITEM_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2,
    "int32": 4, "uint32": 4, "int64": 8, "uint64": 8, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip
_NAMES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Weight:
    """An initializer, or the tensor of a Constant node.

    Args:
        name: its name.
        shape: its shape.
        dtype: "float32", "int64" ...
        location: the file beside the model that holds it; empty when the model holds it.
        missing: the file beside the model does not exist or is too short.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    location: str
    missing: bool
    _proto: Any = field(repr=False, compare=False)
    _external: tuple[Path, int] | None = field(default=None, repr=False, compare=False)

    def nonzero(self) -> Array | None:
        """Where its values differ from zero, bool of its shape; None for a type whose zeros are not counted here."""
        if self.missing or self.dtype not in ("float16", "bfloat16", "float32", "float64", "int8", "uint8"):
            return None
        if self._external is not None:
            path, offset = self._external
            kind = np.dtype("<u2" if self.dtype == "bfloat16" else self.dtype)
            values: Array = np.fromfile(path, dtype=kind, count=math.prod(self.shape), offset=offset)
            values = values.reshape(self.shape)
            # The sign of a bfloat16 zero is no value.
            return (values & 0x7FFF) != 0 if self.dtype == "bfloat16" else values != 0
        onnx = library("onnx", "onnx")
        try:
            found: Array = np.asarray(onnx.numpy_helper.to_array(self._proto))
        except (ValueError, TypeError, OverflowError) as error:
            raise FileFormatError(f"the tensor {self.name!r} does not hold what it says: {error}") from None
        if self.dtype == "bfloat16":
            found = found.astype(np.float32)
        return np.asarray(found != 0).reshape(self.shape)


@dataclass(frozen=True)
class OnnxNode:
    """One operator and its whole numbers; graphs inside it are nodes of their own."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class OnnxValue:
    """An input of the graph; an axis is an int, or None when it is open."""

    name: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class OnnxGraph:
    """What a check needs to know of a file.

    Args:
        path: the file.
        opsets: domain -> version; the default domain is "".
        nodes: all nodes, those of inner graphs included.
        weights: name -> initializer or constant.
        inputs: inputs that a caller feeds.
        outputs: names of the outputs.
        shapes: value -> shape, as far as ONNX's own inference finds it.
        functions: (domain, operator) of the functions that the file itself defines.
    """

    path: Path
    opsets: dict[str, int]
    nodes: list[OnnxNode]
    weights: dict[str, Weight]
    inputs: list[OnnxValue]
    outputs: tuple[str, ...]
    shapes: dict[str, Shape]
    functions: frozenset[tuple[str, str]]


def read_onnx(file: files.PathLike, shapes: Mapping[str, Sequence[int]] | None = None) -> OnnxGraph:
    """Read an ONNX file and check that it is whole: sizes, names, and files beside it.

    Args:
        file: the file.
        shapes: input -> shape to assume instead of the one in the file.

    Returns:
        The facts.

    Raises:
        FileFormatError: missing, damaged, not ONNX, or pointing outside its folder.
        LinkPathError: a symbolic link.
        ArgumentError: `shapes` names no input, or does not fit it.
        MissingFrameworkError: onnx is not installed.
    """
    path = files.readable_file(file, "file")
    onnx = library("onnx", "onnx")
    if path.stat().st_size >= LIMIT_BYTES:
        raise FileFormatError(f"{path} is larger than 2 GB, which an ONNX file cannot be. Export with external data.")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf raises its own kinds, which differ between its back ends
        raise FileFormatError(f"{path} is not an ONNX file: {' '.join(str(error).split())[:200]}") from error
    try:
        return _Reader(onnx, path).read(proto, shapes)
    except (UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{path} is a damaged ONNX file: {error}") from None


class _Reader:
    """One reading of one file."""

    def __init__(self, onnx: Any, path: Path) -> None:
        self.onnx, self.path = onnx, path
        self.nodes: list[OnnxNode] = []
        self.weights: dict[str, Weight] = {}

    def refuse(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is a damaged ONNX file: {what}")

    def text(self, value: Any) -> str:
        """A string of the file; protobuf hands over bytes where they are not UTF-8."""
        if not isinstance(value, str):
            raise self.refuse("it holds a name that is not UTF-8 text")
        return value

    def texts(self, values: Any) -> tuple[str, ...]:
        return tuple(self.text(value) for value in values)

    def read(self, proto: Any, shapes: Mapping[str, Sequence[int]] | None) -> OnnxGraph:
        domains = self.texts(o.domain for o in proto.opset_import)
        opsets = {("" if d == "ai.onnx" else d): int(o.version) for d, o in zip(domains, proto.opset_import)}
        if not proto.HasField("graph") or not proto.ir_version or "" not in opsets:
            raise self.refuse("it holds no graph, or no version of the default operators")
        if not proto.graph.node and not proto.graph.output:
            raise self.refuse("its graph is empty")
        inputs = self._graph(proto.graph, frozenset())
        asked = self._asked(inputs, shapes)
        inputs = [OnnxValue(v.name, v.dtype, asked.get(v.name, v.shape)) for v in inputs]
        return OnnxGraph(
            path=self.path,
            opsets=opsets,
            nodes=self.nodes,
            weights=self.weights,
            inputs=inputs,
            outputs=self.texts(o.name for o in proto.graph.output),
            shapes=self._inferred(proto, inputs),
            functions=frozenset((self.text(f.domain), self.text(f.name)) for f in proto.functions),
        )

    def _graph(self, graph: Any, outer: frozenset[str]) -> list[OnnxValue]:
        """Collect a graph's weights and nodes, inner graphs included; returns what a caller feeds."""
        for tensor in graph.initializer:
            self.weights[self.text(tensor.name)] = self._weight(tensor, tensor.name)
        for sparse in graph.sparse_initializer:
            self.weights.pop(sparse.values.name, None)
        own = {t.name for t in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
        inputs = [self._value(i) for i in graph.input if i.name not in own]
        known = set(outer) | own | {self.text(i.name) for i in graph.input}
        for node in graph.node:
            for name in self.texts(node.input):
                if name and name not in known:
                    raise self.refuse(f"{node.op_type} {node.name!r} reads {name!r}, which nothing before it writes")
            self._node(node, frozenset(known))
            known.update(name for name in self.texts(node.output) if name)
        for output in graph.output:
            if output.name not in known:
                raise self.refuse(f"nothing writes its output {output.name!r}")
        return inputs

    def _node(self, node: Any, known: frozenset[str]) -> None:
        if not self.text(node.op_type):
            raise self.refuse(f"the node {node.name!r} has no operator")
        kinds = self.onnx.AttributeProto
        numbers: dict[str, int] = {}
        inner = []
        for attribute in node.attribute:
            if attribute.type == kinds.GRAPH:
                inner.append(attribute.g)
            elif attribute.type == kinds.GRAPHS:
                inner.extend(attribute.graphs)
            elif attribute.type == kinds.TENSOR:
                if node.op_type == "Constant" and node.output:
                    self.weights[node.output[0]] = self._weight(attribute.t, node.output[0])
            elif attribute.type == kinds.INT:
                numbers[self.text(attribute.name)] = int(attribute.i)
        domain = "" if node.domain == "ai.onnx" else self.text(node.domain)
        inputs, outputs = self.texts(node.input), self.texts(node.output)
        self.nodes.append(
            OnnxNode(self.text(node.name), node.op_type, domain, inputs, outputs, numbers)
        )  # fmt: skip
        for graph in inner:
            self._graph(graph, known)

    def _dtype(self, number: int) -> str:
        try:
            name = self.onnx.TensorProto.DataType.Name(number).lower()
        except ValueError:
            raise self.refuse(f"{number} is no data type") from None
        return _NAMES.get(name, name)

    def _value(self, value: Any) -> OnnxValue:
        if not value.type.HasField("tensor_type"):
            return OnnxValue(value.name, value.type.WhichOneof("value") or "undefined", None)
        tensor = value.type.tensor_type
        shape: Shape | None = None
        if tensor.HasField("shape"):
            shape = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)
            if any(size is not None and size < 0 for size in shape):
                raise self.refuse(f"the input {value.name!r} has a negative size")
        return OnnxValue(value.name, self._dtype(tensor.elem_type), shape)

    def _weight(self, tensor: Any, name: str) -> Weight:
        shape, dtype = tuple(int(d) for d in tensor.dims), self._dtype(tensor.data_type)
        if any(size < 0 for size in shape):
            raise self.refuse(f"the tensor {name!r} has a negative size")
        size = _ITEM_BYTES.get(dtype)
        needed = math.prod(shape) * size if size else None
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            return self._external(tensor, name, shape, dtype, needed)
        if tensor.HasField("raw_data"):
            held: int | None = len(tensor.raw_data) if size else None
        else:
            fields = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
            count = max(len(getattr(tensor, f)) for f in fields)
            # Complex numbers take two entries of float_data or double_data.
            held = count * size // (2 if dtype.startswith("complex") else 1) if size else None
        if held != needed:
            raise self.refuse(f"the tensor {name!r} of shape {list(shape)} holds {held} bytes where {needed} belong")
        return Weight(name, shape, dtype, "", False, tensor)

    def _external(self, tensor: Any, name: str, shape: tuple[int, ...], dtype: str, needed: int | None) -> Weight:
        told = {self.text(entry.key): self.text(entry.value) for entry in tensor.external_data}
        location = told.get("location", "")
        try:
            offset = int(told.get("offset") or 0)
            target = files.inside(self.path.parent, location, "location")
        except ValueError:
            raise self.refuse(
                f"the tensor {name!r} lies in {location!r}, which is no place inside its folder"
            ) from None
        if offset < 0 or Path(location).is_absolute():
            raise self.refuse(
                f"the tensor {name!r} lies in {location!r} at {offset}, which is no place inside its folder"
            )
        missing = not target.is_file() or (needed is not None and target.stat().st_size < offset + needed)
        return Weight(name, shape, dtype, location, missing, tensor, (target, offset))

    def _asked(self, inputs: Sequence[OnnxValue], shapes: Mapping[str, Sequence[int]] | None) -> dict[str, Shape]:
        """Check the shapes that the caller gave against the inputs."""
        if shapes is None:
            return {}
        check.instance(shapes, Mapping, "shapes", "a dict of input name -> shape")
        known = {v.name: v for v in inputs}
        for name, shape in shapes.items():
            check.choice(name, list(known), "a key of shapes")
            if not isinstance(shape, Sequence) or isinstance(shape, str):
                check.wrong_type(f"shapes[{name!r}]", "a list of int", shape)
            for size in shape:
                check.positive(size, f"shapes[{name!r}]")
            told = known[name].shape
            if told is not None and (
                len(told) != len(shape) or any(t is not None and t != s for t, s in zip(told, shape))
            ):
                allowed = f"of the form {['?' if t is None else t for t in told]}"
                check.wrong_value(f"shapes[{name!r}]", allowed, list(shape))
        return {name: tuple(shape) for name, shape in shapes.items()}

    def _inferred(self, proto: Any, inputs: Sequence[OnnxValue]) -> dict[str, Shape]:
        """Shapes of all values by ONNX's own inference, on a copy without the large weights."""
        onnx = self.onnx
        copy = onnx.ModelProto(ir_version=proto.ir_version)
        copy.opset_import.extend(proto.opset_import)
        copy.functions.extend(proto.functions)
        graph = copy.graph
        graph.name = "shapes"
        graph.node.extend(proto.graph.node)
        graph.output.extend(proto.graph.output)
        for value in inputs:
            if value.dtype in _ITEM_BYTES and value.shape is not None:
                graph.input.append(self._info(value.name, value.dtype, value.shape))
        for tensor in proto.graph.initializer:
            weight = self.weights[tensor.name]
            if weight.location or math.prod(weight.shape) > 64:
                if weight.dtype in _ITEM_BYTES:
                    graph.input.append(self._info(weight.name, weight.dtype, weight.shape))
            else:
                # Small ones are shapes and axes, which the inference needs the values of.
                graph.initializer.append(tensor)
        needed = [n.outputs[0] for n in self.nodes if n.operator in _MULTIPLIERS and n.outputs]
        fixed = all(v.shape is not None and None not in v.shape for v in inputs)
        return infer(onnx, copy, needed if fixed else [])

    def _info(self, name: str, dtype: str, shape: Shape) -> Any:
        number = self.onnx.TensorProto.DataType.Value({v: k for k, v in _NAMES.items()}.get(dtype, dtype).upper())
        return self.onnx.helper.make_tensor_value_info(name, number, list(shape))
