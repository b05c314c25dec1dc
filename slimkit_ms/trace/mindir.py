"""A cell's compiled graph, read out of MindSpore as flat records: operators, constants, shapes and parameter names."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimkit.core.errors import GraphError
from slimkit.core.prune.graph import common_scope
from slimkit_ms import bridge
from slimkit_ms.trace.spelling import spelled_out

import mindspore as ms
from mindspore import nn
from mindspore.train import mind_ir_pb2

_TYPES = mind_ir_pb2.AttributeProto
_NUMPY: dict[int, Any] = {
    mind_ir_pb2.TensorProto.FLOAT: np.float32,
    mind_ir_pb2.TensorProto.FLOAT16: np.float16,
    mind_ir_pb2.TensorProto.DOUBLE: np.float64,
    mind_ir_pb2.TensorProto.FLOAT64: np.float64,
    mind_ir_pb2.TensorProto.BOOL: np.bool_,
    mind_ir_pb2.TensorProto.INT8: np.int8,
    mind_ir_pb2.TensorProto.INT16: np.int16,
    mind_ir_pb2.TensorProto.INT32: np.int32,
    mind_ir_pb2.TensorProto.INT64: np.int64,
    mind_ir_pb2.TensorProto.UINT8: np.uint8,
    mind_ir_pb2.TensorProto.UINT16: np.uint16,
    mind_ir_pb2.TensorProto.UINT32: np.uint32,
    mind_ir_pb2.TensorProto.UINT64: np.uint64,
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A value known when the graph was compiled: a Python number, str, None or tuple, or an array for a tensor."""

    value: Any


@dataclass
class Record:
    """One operator as MindSpore names it.

    Args:
        op: the primitive's name; "" for the call of a function that is itself a value.
        inputs: names of what it reads, or Constants.
        output: name of what it makes.
        attrs: attributes of the primitive.
        shapes: shape of the output; a list of these for a tuple.
        scope: dotted path of the cell whose code ran it.
    """

    op: str
    inputs: list[Any]
    output: str
    attrs: dict[str, Any]
    shapes: Any
    scope: str


@dataclass
class Flat:
    """A compiled cell: records in the order they run, the names of arguments and result, parameters by name -> path."""

    records: list[Record]
    inputs: list[tuple[str, Shape]]
    output: Any
    parameters: dict[str, str]
    functions: list[str] = field(default_factory=list)  # bodies of branches and loops, by name
    hidden: list[str] = field(default_factory=list)  # what these read of the main graph


class _Captured(Exception):
    """The graph has been seen, so that nothing need be written to disk."""


def compile_flat(model: nn.Cell, inputs: Any) -> Flat:
    """Compile a cell for the shapes of its inputs and read the graph; the cell is left as it was.

    Args:
        model: the cell.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Returns:
        The graph.

    Raises:
        GraphError: MindSpore cannot compile the cell for these inputs.
    """
    args = _positional(model, inputs)
    with bridge.evaluating(model), _untouched(model), spelled_out(model):
        paths = {parameter.name: names for parameter, names in bridge.parameter_paths(model)}
        try:
            proto = _export(model, args)
        except Exception as error:  # whatever the compiler raises: it cannot be traced
            raise GraphError(
                f"MindSpore cannot compile {type(model).__name__}.construct into a graph for these inputs: "
                f"{_first_lines(error)}"
            ) from error
    return _flatten(proto, paths)


def _positional(model: nn.Cell, inputs: Any) -> tuple[Any, ...]:
    args, kwargs = bridge.call_of(inputs)
    signature = inspect.signature(model.construct)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise GraphError(f"inputs do not fit {type(model).__name__}.construct{signature}: {error}") from None
    if not kwargs:
        return tuple(args)
    # The compiler takes arguments by position: those left out in between become their defaults.
    bound.apply_defaults()
    last = max(place for place, name in enumerate(signature.parameters) if name in kwargs or place < len(args))
    return tuple(bound.arguments[name] for name in list(signature.parameters)[: last + 1])


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip("- \t")]
    return " ".join(lines[:3])[:400] or type(error).__name__


@contextlib.contextmanager
def _quiet(folder: str) -> Iterator[None]:
    """Send what the compiler's C++ writes to standard error into a file: a refused cut is no news to a user."""
    try:
        sys.stderr.flush()
        before = os.dup(2)
    except (OSError, ValueError, AttributeError):  # no standard error to keep clean
        yield
        return
    try:
        with open(os.path.join(folder, "stderr"), "wb") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _export(model: nn.Cell, args: tuple[Any, ...]) -> Any:
    seen: list[Any] = []

    def capture(proto: Any) -> None:
        seen.append(proto)
        raise _Captured

    level, dumps = ms.get_context("jit_syntax_level"), os.environ.get("MS_OM_PATH")
    with tempfile.TemporaryDirectory() as folder, _quiet(folder):
        try:
            # A compilation that fails writes its analysis there, and by default into the user's own folder.
            os.environ["MS_OM_PATH"] = folder
            ms.export(model, *args, file_name=os.path.join(folder, "graph"), file_format="MINDIR", custom_func=capture)
        except _Captured:
            pass
        finally:
            ms.set_context(jit_syntax_level=level)
            if dumps is None:
                del os.environ["MS_OM_PATH"]
            else:
                os.environ["MS_OM_PATH"] = dumps
    return seen[0]


@contextlib.contextmanager
def _untouched(model: nn.Cell) -> Iterator[None]:
    """Take back what compiling leaves in a cell: the export's own graph, its bookkeeping, and unique names."""
    keys = ("arguments_key", "_compile_phase", "current_phase", "__parse_method__")
    before = {key: vars(model)[key] for key in keys if key in vars(model)}
    compiled = {phase for _, cell in model.cells_and_names() for phase in cell.compile_cache}
    phases = dict(model.phase_cache)
    names = [(p, p.name) for p, _ in bridge.parameter_paths(model)]
    if max(Counter(name for _, name in names).values(), default=1) > 1:
        bridge.rename_parameters(model)
    try:
        yield
    finally:
        for parameter, name in names:
            if parameter.name != name:
                parameter.name = name
        bridge.forget_graphs(model, keep=compiled)
        model.phase_cache.clear()
        model.phase_cache.update(phases)
        for key in keys:
            if key in before:
                object.__setattr__(model, key, before[key])
            else:
                vars(model).pop(key, None)


# --- reading the protobuf --------------------------------------------------------------------------------------------


def _flatten(proto: Any, paths: dict[str, list[str]]) -> Flat:
    graph = proto.graph
    prefix = graph.name + ":"
    primitives = {p.name: (p.op_type, {a.name: _attribute(a) for a in p.attribute}) for p in proto.primitives}
    functions = {function.name for function in proto.functions}
    constants: dict[str, Constant] = {}
    records = []
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = Constant(_attribute(node.attribute[0]))
            continue
        key = node.op_type.removeprefix("REF::")
        op, attrs = primitives.get(key, ("", {}) if key in functions or key.startswith(prefix) else (key, {}))
        inputs = [constants.get(name, name.removeprefix(prefix)) for name in node.input]
        if not op and key not in functions:
            inputs.append(key.removeprefix(prefix))
        shapes = next((_shape(a) for a in node.attribute if a.name == "shape"), None)
        attrs = {**attrs, **{a.name: _attribute(a) for a in node.attribute if a.name != "shape"}}
        records.append(Record(op, inputs, node.output[0].removeprefix(prefix), attrs, shapes, _scope(node.domain)))
    _place(records, paths)
    result = [_returned(o.name, prefix, constants) for o in graph.output]
    hidden = [
        name.removeprefix(prefix)
        for function in proto.functions
        for node in function.node
        for name in node.input
        if name.startswith(prefix) and name not in constants
    ]
    return Flat(
        records,
        [(i.name.removeprefix(prefix), tuple(i.tensor[0].dims) if i.tensor else ()) for i in graph.input],
        result[0] if len(result) == 1 else result,
        {name: paths[name][0] for name in (p.name.removeprefix(prefix) for p in graph.parameter)},
        sorted(functions),
        hidden,
    )


def _place(records: list[Record], paths: dict[str, list[str]]) -> None:
    """Put every operator into the cell whose code runs it, in place.

    MindSpore compiles methods of tensors without a scope, and cells of one class under the scope of the first of them.
    What reads a parameter certainly runs where that parameter lives; the rest lies in the innermost cell around these.
    Of a parameter that lives in several cells, the scope says which of them reads it, if it is one of them.
    """
    owner = {name: [p.rpartition(".")[0] for p in held] for name, held in paths.items() if "." in held[0]}
    certain: dict[int, str] = {}
    for place, record in enumerate(records):
        owners = [owner[name] for name in record.inputs if isinstance(name, str) and name in owner]
        if record.op == "Load" and owners:
            owner[record.output] = owners[0]
        elif owners:
            certain[place] = record.scope = record.scope if record.scope in owners[0] else owners[0][0]
    above: dict[str, dict[str, None]] = {}
    for place, record in enumerate(records):
        made_by = (name for name in record.inputs if isinstance(name, str))
        gathered = {scope: None for name in made_by for scope in above.get(name, ())}
        above[record.output] = {certain[place]: None} if place in certain else gathered
    below: dict[str, dict[str, None]] = {}
    for place, record in reversed(list(enumerate(records))):
        if record.op in ("Load", "UpdateState", "Depend"):
            continue  # an order of execution, and no flow of data
        read_by = {certain[place]: None} if place in certain else below.get(record.output, {})
        for name in record.inputs:
            if isinstance(name, str):
                below.setdefault(name, {}).update(read_by)
    for place, record in enumerate(records):
        around = [*above[record.output], *below.get(record.output, ())]
        if place not in certain and around and not f"{record.scope}.".startswith(f"{(cell := common_scope(around))}."):
            record.scope = cell
        elif place not in certain and not record.scope and above[record.output] and below.get(record.output):
            record.scope = common_scope(around)


def _returned(name: str, prefix: str, constants: dict[str, Constant]) -> Any:
    return constants.get(name, name.removeprefix(prefix))


def _scope(domain: str) -> str:
    """ "Default/body-Block/conv-Conv2d/Conv2D-op0" -> "body.conv"."""
    parts = domain.split("/")[1:-1]
    return ".".join(part.rpartition("-")[0] for part in parts if "-" in part)


def _shape(attribute: Any) -> Any:
    if attribute.type == _TYPES.TENSORS:
        shapes = [tuple(t.dims) for t in attribute.tensors]
        return shapes[0] if len(shapes) == 1 else shapes
    if attribute.type in (_TYPES.TUPLE, _TYPES.LIST):
        return [_shape(v) for v in attribute.values]
    return None


def _attribute(attribute: Any) -> Any:
    """The Python value of an attribute; numbers stand in one field alone and in another inside a tuple."""
    kind = attribute.type
    if kind in (_TYPES.TUPLE, _TYPES.LIST):
        return tuple(_attribute(v) for v in attribute.values)
    if kind == _TYPES.TENSORS:
        arrays = [_array(t) for t in attribute.tensors]
        return arrays[0] if len(arrays) == 1 else arrays
    if kind == _TYPES.BOOL:
        return bool(attribute.ints[0] if attribute.ints else attribute.i)
    if kind in (_TYPES.INT64, _TYPES.INT32, _TYPES.INT16, _TYPES.INT8, _TYPES.UINT8, _TYPES.UINT32, _TYPES.UINT64):
        return int(attribute.ints[0] if attribute.ints else attribute.i)
    if kind in (_TYPES.FLOAT, _TYPES.FLOAT16, _TYPES.BFLOAT16):
        return float(attribute.floats[0] if attribute.floats else attribute.f)
    if kind == _TYPES.DOUBLE:
        return float(attribute.doubles[0] if attribute.doubles else attribute.d)
    if kind == _TYPES.STRING:
        raw = attribute.strings[0] if attribute.strings else attribute.s
        return raw.decode() if isinstance(raw, bytes) else raw
    return None


def _array(tensor: Any) -> np.ndarray:
    kind, shape = _NUMPY.get(tensor.data_type), tuple(tensor.dims)
    if kind is None:
        # bfloat16 and the rest: two different numbers, so that nobody takes it for a uniform constant.
        return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return np.frombuffer(tensor.raw_data, dtype=kind).reshape(shape)
