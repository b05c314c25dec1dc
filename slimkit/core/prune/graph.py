"""The neutral operator graph: what a tracer of either wing says about a model, for the dimension algebra to read.

A tracer lists *values* (tensors, each with its shape) and *nodes* (operators) in the order they run. It says nothing of
numbers in weights and nothing of a framework. Axes are counted from 0, in the order of the shape, never negative.

Values
    ``kind`` says where a value comes from:

    ========== ===========================================================================================
    input      an argument of the model; its axes are never pruned
    param      a parameter, or a floating-point buffer such as a running mean; ``path`` is its dotted name.
               One tensor under two names (tied weights) is one value, under the first name; the others go to `aliases`.
    uniform    a constant made while the model runs whose elements are all equal (zeros, ones, one scalar)
    constant   any other constant, index tables and masks included; its axes are never pruned
    result     the output of a node
    ========== ===========================================================================================

Operators (``op``; inputs as value numbers, None for an absent optional one; shapes of outputs are in the values)
    =============== ===================== ===========================================================================
    op              inputs                attrs, meaning
    =============== ===================== ===========================================================================
    elementwise     any number            broadcasting as in NumPy: add, mul, relu, where, masked_fill, dropout,
                                          cast
                                          ... ``fn`` names it; ``zero`` is True where f(0) = 0 for a unary one
    identity        x                     the same values in the same shape
    reshape         x                     any change of shape in row-major order: view, flatten, squeeze, unsqueeze
    transpose       x                     ``perm``: output axis i is input axis perm[i]
    expand          x                     broadcast to the output's shape, new axes in front; repeats nothing else
    repeat          x                     ``repeats`` for each axis (tile); output rank = input rank
    concat          any number            ``axis``
    stack           any number            ``axis`` of the output that is new
    split           x -> several          ``axis``, ``sizes``; chunk is a split too
    slice           x                     ``axis``, ``start``, ``stop`` (both within the size), ``step`` > 0
    select          x                     ``axis``, ``index``: one index, the axis goes away; unbind is several
                                          selects
    unbind          x -> several          ``axis``: one output for each index
    pad             x                     ``pads``: (before, after) for each axis
    linear          x, weight, bias?      x (..., I), weight (O, I); ``layout`` "io" for a weight (I, O)
    matmul          a, b                  batched a (..., M, K) and b (..., K, N), batch axes broadcast;
                                          ``transpose_a`` / ``transpose_b`` swap the last two axes first
    conv            x, weight, bias?      x (B, I, *space), weight (O, I / groups, *kernel); ``groups``;
                                          ``transposed``
                                          True: weight (I, O / groups, *kernel)
    norm            x, params...          statistics elsewhere than over ``axes``, or none: batch norm (and instance
                                          norm);
                                          params (n,) belong to ``axes`` = [1]
    layer_norm      x, weight?, bias?     ``axes`` normalised together, params have exactly their shape; RMS norm
                                          too
    group_norm      x, weight?, bias?     ``groups`` over axis 1
    pool            x                     pooling and resizing over the last ``space`` axes; the others stay
    reduce          x                     ``axes``, ``keepdim``, ``fn`` in sum mean amax amin var std prod norm any
                                          all
    along           x                     same shape, index by index along ``axes``, order or normaliser matters:
                                          softmax, cumsum, sort, flip, roll over an axis; those axes are never
                                          pruned
    embedding       table, index          rows of the table: output shape = index shape + table shape[1:]
    gather          x, index              ``axis``: index_select; that axis is replaced by the axes of a constant
                                          index
    scatter         x, index, source      ``axis`` is written by index; other axes of x, source and output are equal
    attention       q, k, v, mask?        (B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv) -> (B, H, T, Dv); H a multiple
                                          of Hk
    pixel_shuffle   x                     ``factor``; ``inverse`` True for unshuffle
    channel_shuffle x                     ``groups`` over axis 1
    unfold          x                     ``kernel``: number of kernel positions; (B, C, *space) -> (B, C * kernel,
                                          L)
    custom          any -> any            a user's operator or layer (``fn``): ``rule`` is its key in the table of
                                          `custom`, ``arguments`` what is no tensor, ``parameters`` names of the last
                                          inputs
    opaque          any -> any            everything else: ``fn`` names it, all axes of all its inputs and outputs
                                          stay whole
    =============== ===================== ===========================================================================

A tracer may decompose (softmax attention as matmul, along, matmul; Dense as transpose, matmul, elementwise) or keep an
operator whole; the algebra finds the same coupling. ``scope`` is the dotted path of the module whose code ran the
operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from slimkit.core.errors import GraphError

KINDS = ("input", "param", "uniform", "constant", "result")

OPS = [
    "elementwise",
    "identity",
    "reshape",
    "transpose",
    "expand",
    "repeat",
    "concat",
    "stack",
    "split",
    "slice",
    "select",
    "unbind",
    "pad",
    "linear",
    "matmul",
    "conv",
    "norm",
    "layer_norm",
    "group_norm",
    "pool",
    "reduce",
    "along",
    "embedding",
    "gather",
    "scatter",
    "attention",
    "pixel_shuffle",
    "channel_shuffle",
    "unfold",
    "custom",
    "opaque",
]


@dataclass(slots=True)
class Value:
    """One tensor: its shape, where it comes from, and the dotted path of a parameter or buffer."""

    shape: tuple[int, ...]
    kind: str
    path: str = ""


@dataclass(slots=True)
class Node:
    """One operator: numbers of its input and output values, its attributes, and the module whose code ran it."""

    op: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    attrs: dict[str, Any]
    scope: str = ""


@dataclass
class Graph:
    """A traced model.

    Args:
        values: all tensors; a value's number is its place in this list.
        nodes: operators in the order they ran.
        outputs: numbers of the values that the model returns.
        shapes: every parameter and floating-point buffer of the model by path, traced or not.
        aliases: further paths of tied parameters -> the path under which they appear.
        buffers: the paths among `shapes` that are buffers, not parameters.
        layers: paths of the Conv and Linear layers in the order they first ran, as `un_prune_list` counts them.
        notes: what the tracer had to assume, for the report.
        ends: number of nodes after each forward pass; several passes (examples, modes) make one graph, and costs count
            the first one only. Empty for one pass.
        further: paths of Conv and Linear layers that only later passes ran.
        crossings: module -> values that modules inside it handed to it, in the first pass.
        parted: paths among `shapes` that were tied when the model was traced, and are to be apart.

    Example:
        >>> g = Graph(shapes={"fc.weight": (4, 3)})
        >>> x, w = g.add_value((2, 3), "input"), g.add_value((4, 3), "param", "fc.weight")
        >>> y = g.add_value((2, 4))
        >>> g.add("linear", [x, w, None], [y], scope="fc")
        >>> g.outputs.append(y)
        >>> g.check()
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    further: list[str] = field(default_factory=list)
    crossings: dict[str, list[int]] = field(default_factory=dict)
    parted: set[str] = field(default_factory=set)

    def add_value(self, shape: Iterable[int], kind: str = "result", path: str = "") -> int:
        """Append a value and return its number."""
        self.values.append(Value(tuple(shape), kind, path))
        return len(self.values) - 1

    def add(self, op: str, inputs: Sequence[int | None], outputs: Sequence[int], scope: str = "", **attrs: Any) -> None:
        """Append an operator."""
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), attrs, scope))

    def check(self) -> None:
        """Refuse a graph that a tracer built wrongly.

        Raises:
            GraphError: an unknown operator or kind, a value number out of range, a parameter of another shape.
        """
        made: set[int] = set()
        for number, value in enumerate(self.values):
            if value.kind not in KINDS:
                raise GraphError(f"value {number} must be of a kind in {KINDS}. Received: {value.kind!r}")
            if value.kind == "param" and self.shapes.get(value.path) != value.shape:
                raise GraphError(
                    f"parameter {value.path!r} must have the shape {self.shapes.get(value.path)}. "
                    f"Received: {value.shape}"
                )
            if value.kind != "result":
                made.add(number)
        for place, node in enumerate(self.nodes):
            if node.op not in OPS:
                raise GraphError(f"node {place} must be one of the {len(OPS)} operators. Received: {node.op!r}")
            missing = [i for i in node.inputs if i is not None and i not in made]
            if missing:
                raise GraphError(f"node {place} ({node.op}) must read values made before it. Received: {missing}")
            made.update(node.outputs)
        if not set(self.outputs) <= made:
            raise GraphError(f"outputs must be values of the graph. Received: {self.outputs}")


def within(scope: str, outer: str) -> bool:
    """Whether a scope is another one, or lies in it; all lie in the model, whose scope is empty.

    Example:
        >>> within("a.b", "a"), within("a.b", ""), within("ab", "a")
        (True, True, False)
    """
    return not outer or scope == outer or scope.startswith(f"{outer}.")


def common_scope(scopes: Sequence[str]) -> str:
    """The innermost scope around several.

    Example:
        >>> common_scope(["a.b.c", "a.b.d"])
        'a.b'
    """
    levels = zip(*(scope.split(".") for scope in scopes))
    return ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, levels))
