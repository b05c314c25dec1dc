"""A MindSpore cell and example inputs -> the neutral operator graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from slimkit.core.errors import ArgumentError
from slimkit.core.prune.custom import CUSTOM
from slimkit.core.prune.graph import Graph
from slimkit_ms import bridge, kinds
from slimkit_ms.trace.builder import Builder, Entry, NotSaid, flat_shapes
from slimkit_ms.trace.mindir import Constant, Flat, Record, compile_flat
from slimkit_ms.trace.rules import RULES

import mindspore as ms
from mindspore import nn

__all__ = ["Mark", "Traced", "trace", "trace_marked"]


@dataclass(frozen=True)
class Mark:
    """One operator as compiled: what to compare a pruned cell's graph with.

    Args:
        op: the primitive.
        scope: path of the cell whose code ran it.
        shapes: shapes of its outputs.
        values: their numbers in the neutral graph; empty where one of them is no plain tensor.
    """

    op: str
    scope: str
    shapes: tuple[tuple[int, ...], ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Traced:
    """A neutral graph, and the compiled operators it was read from."""

    graph: Graph
    marks: list[Mark]


def trace(model: nn.Cell, inputs: Any) -> Graph:
    """Read a cell's operators and shapes from its compiled graph; the cell is left as it was.

    Args:
        model: the cell; it is compiled in evaluation mode.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments, batch first. Only their shapes
            and types matter.

    Returns:
        The neutral graph. Primitives without a rule, and what branches and loops touch, are "opaque" nodes.

    Raises:
        ArgumentError: `inputs` is None; MindSpore compiles for given shapes only.
        GraphError: MindSpore cannot compile the cell.

    Example:
        >>> graph = trace(nn.Dense(3, 4), ms.ops.ones((2, 3)))
        >>> [node.op for node in graph.nodes], graph.layers
        (['linear'], [''])
    """
    return trace_marked(model, inputs).graph


def trace_marked(model: nn.Cell, inputs: Any) -> Traced:
    """As `trace`, with the compiled operators beside the graph."""
    bridge.check_model(model)
    if inputs is None:
        raise ArgumentError(
            "inputs must be an example of what the cell takes: MindSpore compiles for given shapes. Received: None"
        )
    flat = compile_flat(model, inputs)
    graph = _parameters(model)
    builder = Builder(graph, _uses(flat), _tables(model))
    for name, path in flat.parameters.items():
        builder.env[name] = graph.add_value(graph.shapes[path], "param", path)
    builder.env.update(dict.fromkeys(flat.functions, Constant(None)))
    for name, shape in flat.inputs:
        builder.env[name] = graph.add_value(shape, "input")
    marks = []
    for record in flat.records:
        entry = builder.env[record.output] = _said(builder, record)
        if record.op not in _STRUCTURE and record.op != "UpdateState":
            parts = entry if isinstance(entry, list) else [entry]
            values = tuple(n for n in parts if isinstance(n, int))
            whole = len(values) == len(parts)
            marks.append(Mark(record.op, record.scope, tuple(flat_shapes(record.shapes)), values if whole else ()))
    if flat.hidden:
        read = [builder.env[name] for name in dict.fromkeys(flat.hidden) if name in builder.env]
        builder.emit("opaque", builder.flat(read), [], "", fn="a branch or a loop")
    result = flat.output if isinstance(flat.output, list) else [flat.output]
    for name in result:
        entry = builder.entry(name)
        graph.outputs.extend(builder.flat(entry))
    graph.layers = _layers(model, graph)
    graph.check()
    return Traced(graph, marks)


def _said(builder: Builder, record: Record) -> Entry:
    """What a record's output stands for; the nodes that say so are appended."""
    if record.op == "UpdateState":
        return Constant(None)
    place = len(builder.graph.nodes), len(builder.graph.values)
    if record.op in CUSTOM:
        return _by_user(builder, record)
    rule = RULES.get(record.op)
    if rule is not None and not (_all_constant(builder, record) and record.op not in _STRUCTURE):
        try:
            return rule(builder, record)
        except NotSaid as why:
            # A rule may have begun; nothing of that is to stay.
            del builder.graph.nodes[place[0] :], builder.graph.values[place[1] :]
            builder.graph.notes.append(f"{record.scope or 'the model'}: {record.op} stays whole: {why}")
    shapes = flat_shapes(record.shapes)
    if record.op and _all_constant(builder, record):
        made: list[Entry] = [builder.graph.add_value(s, _kind(builder, record)) for s in shapes]
    else:
        made = list(builder.opaque(record, shapes))
    return made if isinstance(record.shapes, list) or len(made) != 1 else made[0]


def _by_user(builder: Builder, record: Record) -> Entry:
    """A primitive that the user gave a rule for."""
    entries = [builder.entry(name) for name in record.inputs]
    plain = [e.value if isinstance(e, Constant) else None for e in entries]
    tensors = [n for entry in entries for n in builder.flat(entry)]
    shapes = flat_shapes(record.shapes)
    made = builder.emit("custom", tensors, shapes, record.scope, rule=record.op, fn=record.op, arguments=plain)
    return made if isinstance(record.shapes, list) else made[0]


_STRUCTURE = {"MakeTuple", "MakeList", "TupleGetItem", "ListGetItem", "Depend", "Load", "Identity", "Range", "Arange"}


def _all_constant(builder: Builder, record: Record) -> bool:
    """Nothing of what a record reads depends on an argument or a parameter."""

    def constant(entry: Entry) -> bool:
        if isinstance(entry, (list, tuple)):
            return all(map(constant, entry))
        if isinstance(entry, int):
            return builder.graph.values[entry].kind in ("constant", "uniform")
        return isinstance(entry, Constant)

    return all(constant(builder.entry(name)) for name in record.inputs)


def _kind(builder: Builder, record: Record) -> str:
    """Arithmetic on uniform tensors is uniform; anything else made of constants is a constant."""
    numbers = [n for name in record.inputs for n in builder.flat(builder.entry(name))]
    arithmetic = record.op in RULES and record.op not in ("Range", "Arange", "Eye", "LinSpace", "Concat", "PadV3")
    same = all(builder.graph.values[n].kind == "uniform" for n in numbers)
    constants = [builder.entry(name) for name in record.inputs]
    tensors = [e for e in constants if isinstance(e, Constant) and hasattr(e.value, "shape") and e.value.size > 1]
    return "uniform" if arithmetic and same and not tensors else "constant"


def _uses(flat: Flat) -> Counter[str]:
    uses = Counter(name for record in flat.records for name in record.inputs if isinstance(name, str))
    uses.update(name for name in [flat.output] if isinstance(name, str))
    return uses


def _parameters(model: nn.Cell) -> Graph:
    """A graph that knows the shapes of all parameters."""
    graph = Graph()
    for parameter, (path, *further) in bridge.parameter_paths(model):
        graph.shapes[path] = tuple(parameter.shape)
        graph.aliases.update(dict.fromkeys(further, path))
        if not bridge.is_weight(parameter, path):
            graph.buffers.add(path)
    return graph


def _tables(model: nn.Cell) -> set[tuple[int, ...]]:
    """Shapes of the tensors that cells hold as plain attributes."""
    return {
        tuple(value.shape)
        for _, cell in model.cells_and_names()
        for value in vars(cell).values()
        if isinstance(value, ms.Tensor) and not isinstance(value, ms.Parameter) and value.size > 1
    }


def _layers(model: nn.Cell, graph: Graph) -> list[str]:
    """Paths of the convolutions and dense layers, in the order they first run."""
    cells = dict(model.cells_and_names())
    found: dict[str, None] = {}
    for node in graph.nodes:
        weight = node.inputs[1] if node.op in ("conv", "linear") else None
        path = graph.values[weight].path.rpartition(".")[0] if weight is not None else ""
        if not kinds.is_layer(cells.get(path)) and f"{node.scope}.weight" in graph.aliases:
            path = node.scope  # a layer whose weight is a table's too
        if weight is not None and graph.values[weight].kind == "param" and kinds.is_layer(cells.get(path)):
            found.setdefault(path)
    return list(found)
