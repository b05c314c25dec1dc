"""Rules for values, tuples and operators that work element by element."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit_ms.trace.builder import Builder, Entry, NotSaid, shape_of
from slimkit_ms.trace.mindir import Constant, Record

# What the graph's vocabulary calls the arithmetic that the core looks for; other operators keep MindSpore's names.
_WORDS = {
    name: word
    for word, names in {
        "add": "Add AddExt AddScalar AddV2 AddN InplaceAdd InplaceAddExt InplaceAddsExt",
        "sub": "Sub SubExt SubScalar InplaceSub InplaceSubExt InplaceSubScalar",
        "mul": "Mul Muls InplaceMul InplaceMuls",
        "div": "Div Divs RealDiv InplaceDiv InplaceDivs",
        "square": "Square",
        "neg": "Neg",
    }.items()
    for name in names.split()
}


def same(b: Builder, r: Record) -> Entry:
    return b.entry(r.inputs[0])


def make_tuple(b: Builder, r: Record) -> Entry:
    return [b.entry(i) for i in r.inputs]


def get_item(b: Builder, r: Record) -> Entry:
    items = b.entry(r.inputs[0])
    index = b.arg(r, 1, "index")
    if isinstance(items, Constant):
        return Constant(items.value[index])
    return items[index]


def cast(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    if b.graph.values[x].kind == "param":
        return x  # mixed precision casts weights as it goes; it is still the weight
    return b.one("elementwise", [x], shape_of(r), r.scope, fn="cast", zero=True)


def filled(b: Builder, r: Record) -> Entry:
    return b.graph.add_value(shape_of(r), "uniform")


def made(b: Builder, r: Record) -> Entry:
    return b.graph.add_value(shape_of(r), "constant")


def elementwise(b: Builder, r: Record, zero: bool = False) -> Entry:
    inputs = []
    for name in r.inputs:
        entry = b.entry(name)
        if isinstance(entry, list):
            inputs.extend(b.flat(entry))
        elif isinstance(entry, Constant):
            if _numeric(entry.value):
                inputs.append(b.number(entry))
        else:
            inputs.append(b.number(entry))
    if not inputs:
        raise NotSaid("no tensor")
    return b.one("elementwise", inputs, shape_of(r), r.scope, fn=_WORDS.get(r.op, r.op), zero=zero)


def power(b: Builder, r: Record) -> Entry:
    """A square by its own name: squares mean more to the core than other powers do."""
    exponent = b.entry(r.inputs[1]) if len(r.inputs) > 1 else None
    is_two = isinstance(exponent, Constant) and np.size(exponent.value) == 1 and bool(np.all(exponent.value == 2))
    if not is_two:
        return elementwise(b, r)
    return b.one("elementwise", [b.need(r, 0)], shape_of(r), r.scope, fn="square", zero=True)


def unary(b: Builder, r: Record, zero: bool = False) -> Entry:
    return b.one("elementwise", [b.need(r, 0)], shape_of(r), r.scope, fn=_WORDS.get(r.op, r.op), zero=zero)


def _numeric(value: Any) -> bool:
    return hasattr(value, "dtype") or isinstance(value, (int, float))


def bias_add(b: Builder, r: Record) -> Entry:
    """A bias belongs to its convolution or product; elsewhere it is a sum along axis 1."""
    x, bias = b.need(r, 0), b.need(r, 1)
    node = b.graph.nodes[b.producer[x]] if x in b.producer else None
    if (
        node is not None
        and node.op in ("conv", "linear")
        and node.inputs[2] is None
        and b.uses.get(str(r.inputs[0])) == 1
        and b.graph.values[bias].kind == "param"
    ):
        node.inputs = (node.inputs[0], node.inputs[1], bias)
        return x
    return b.one("elementwise", [x, along_channel(b, r, bias, len(shape_of(r)))], shape_of(r), r.scope, fn="BiasAdd")


def along_channel(b: Builder, r: Record, number: int, rank: int) -> int:
    """A vector over axis 1, shaped to broadcast there."""
    shape = b.shape(number)
    if rank == 2 or shape in ((), (1,)):
        return number
    return b.one("reshape", [number], (*shape, *(1,) * (rank - 2)), r.scope)


def prelu(b: Builder, r: Record) -> Entry:
    x, weight = b.need(r, 0), b.need(r, 1)
    inputs = [x, along_channel(b, r, weight, len(shape_of(r)))]
    return b.one("elementwise", inputs, shape_of(r), r.scope, fn="PReLU", zero=True)
