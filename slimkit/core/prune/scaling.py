"""Channels that may be written and read in another scale: who writes each, who reads it, by one walk over the graph.

A channel that one row of a parameter writes, and that nothing but matrices reads, may carry any positive factor: its
writer divided by s and the columns that read it times s leave the model what it is. What may lie between is what hands
a factor on as it is: moves and copies of elements, products with something else, sums over other axes, shares of
attention, and activations with f(s x) = s f(x). Writers are rows of a matrix, the scale of a norm, and whatever bias is
added to either. Each is found by what the operators do, and no name of a layer is asked for:

    norm g, b -> q, k, v      g' = g / s, b' = b / s, W' = W diag(s)
    up, act(gate) * up, down  W_up' = diag(1 / s) W_up, W_down' = W_down diag(s)
    v, shares @ v, o          the same; heads of queries that share a head of values share its factors

A channel that meets anything else keeps its scale, and so does all that it would be added to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.prune.graph import Graph, Node
from slimkit.core.prune.moves import MOVES, NONE

Array = np.ndarray[Any, Any]

# f(s x) = s f(x) for s > 0, by either framework's name.
_ALIKE = frozenset(["cast", "dropout", "native_dropout", "clone", "neg", "abs", "relu", "leaky_relu", "leakyrelu"])
_SUMS, _PASSING_REDUCTIONS = frozenset({"add", "sub", "biasadd"}), frozenset({"sum", "mean", "amax", "amin"})


@dataclass(frozen=True)
class Ends:
    """An axis of a parameter whose indices write or read channels.

    Args:
        path: of the parameter.
        axis: of the parameter.
        channels: (size,) the channel that each index writes or reads; -1 where it has to stay as it is.
    """

    path: str
    axis: int
    channels: Array


@dataclass(frozen=True)
class Scalable:
    """What may be scaled in a model.

    Args:
        writers: parameters that are divided by their channels' factors.
        readers: matrices that are multiplied with them.
    """

    writers: list[Ends]
    readers: list[Ends]

    def places(self) -> list[list[Ends]]:
        """The readers in groups that share no channel with each other; those that read none are left out."""
        owner: dict[int, int] = {}
        groups: dict[int, list[Ends]] = {}
        for number, reader in enumerate(self.readers):
            seen = np.unique(reader.channels[reader.channels != NONE]).tolist()
            if not seen:
                continue
            groups[number] = [reader]
            for other in {owner[c] for c in seen if c in owner}:
                groups[number] = groups.pop(other) + groups[number]
            mine = {c for one in groups[number] for c in one.channels.tolist()} - {NONE}
            owner.update(dict.fromkeys(mine, number))
        return list(groups.values())


def scalable(graph: Graph) -> Scalable:
    """The channels of a traced model that may be scaled.

    Args:
        graph: of all passes of the model.

    Example:
        >>> g = Graph(shapes={"a.weight": (3, 2), "b.weight": (1, 3)})
        >>> x, h, y = (g.add_value((4, n), kind) for n, kind in ((2, "input"), (3, "result"), (1, "result")))
        >>> a, b = (g.add_value(shape, "param", path) for path, shape in g.shapes.items())
        >>> g.add("linear", [x, a, None], [h])
        >>> g.add("linear", [h, b, None], [y])
        >>> g.outputs.append(y)
        >>> [(one.path, one.channels.tolist()) for one in scalable(g).readers if one.channels.max() >= 0]
        [('b.weight', [0, 1, 2])]
    """
    walk = _Walk(graph)
    for node in graph.nodes:
        walk.step(node)
    for number in graph.outputs:
        walk.fix(walk.labels.get(number))
    return walk.found()


class _Walk:
    """Follows channels through a graph.

    Every value has an array that broadcasts to its shape and says which channel's factor each element would carry.

    Args:
        graph: a traced model.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels: dict[int, Array] = {}
        # Value -> the parameter that it is: an index for each element of a vector, the parameter's axes of a matrix.
        self.vectors: dict[int, tuple[str, Array]] = {}
        self.matrices: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.writers: dict[str, Ends] = {}
        self.added: dict[str, Array] = {}
        self.readers: dict[str, Ends] = {}
        self.elsewhere: set[str] = set()  # parameters that something else reads as well
        self.fixed = np.zeros(0, bool)
        for number, value in enumerate(graph.values):
            if value.kind == "param" and value.path not in graph.buffers:
                if len(value.shape) == 1:
                    self.vectors[number] = value.path, np.arange(value.shape[0])
                elif len(value.shape) == 2:
                    self.matrices[number] = value.path, (0, 1)
                else:
                    self.elsewhere.add(value.path)

    # What is found ---------------------------------------------------------------------------------------------

    def found(self) -> Scalable:
        for path in self.added:
            if path in self.writers or path in self.readers:
                self.elsewhere.add(path)
        self.keep_unseen()
        for path in self.elsewhere:
            for ends in (self.writers.get(path), self.readers.get(path)):
                self.fix(None if ends is None else ends.channels)
            self.fix(self.added.get(path))
        written = [*self.writers.values(), *(Ends(path, 0, channels) for path, channels in self.added.items())]

        def open_only(ends: Ends) -> Ends:
            safe = np.maximum(ends.channels, 0)
            open_ = (ends.channels != NONE) & ~self.fixed[safe] if self.fixed.size else np.zeros(len(safe), bool)
            return Ends(ends.path, ends.axis, np.where(open_, ends.channels, NONE))

        return Scalable([open_only(e) for e in written], [open_only(e) for e in self.readers.values()])

    def keep_unseen(self) -> None:
        """Where a module holds parameters that no pass used, another pass may read there what this one did not."""
        used = {self.graph.values[n].path for node in self.graph.nodes for n in node.inputs if n is not None}
        unseen = self.graph.shapes.keys() - used - self.graph.buffers
        around = {path.rsplit(".", k)[0] for path in unseen for k in (1, 2) if path.count(".") >= k}
        for path in (*self.readers, *self.writers):
            if path.rpartition(".")[0].rpartition(".")[0] in around and path.count(".") > 1:
                self.elsewhere.add(path)

    def fix(self, labels: Array | None) -> None:
        """These channels keep their scale."""
        if labels is not None:
            self.fixed[labels[labels != NONE]] = True

    def put(self, number: int, labels: Array | None) -> None:
        """What a value carries; axes along which it is one are one."""
        if labels is None:
            return
        rank = len(self.graph.values[number].shape)
        labels = labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
        for axis, size in enumerate(labels.shape):
            first = labels.take([0], axis) if size > 1 else labels
            if size > 1 and bool((labels == first).all()):
                labels = first
        if bool((labels != NONE).any()):
            self.labels[number] = labels

    def writes(self, path: str, axis: int) -> Array:
        """The channels that a parameter's axis writes."""
        if path not in self.writers:
            start, size = len(self.fixed), self.graph.shapes[path][axis]
            self.fixed = np.concatenate([self.fixed, np.zeros(size, bool)])
            self.writers[path] = Ends(path, axis, np.arange(start, start + size))
        ends = self.writers[path]
        if ends.axis != axis:
            self.elsewhere.add(path)
        return ends.channels if ends.axis == axis else np.full(self.graph.shapes[path][axis], NONE)

    def reads(self, path: str, axis: int, channels: Array) -> None:
        known = self.readers.setdefault(path, Ends(path, axis, channels))
        if known.axis != axis or not np.array_equal(known.channels, channels):
            self.fix(channels)
            self.elsewhere.add(path)

    def refuse(self, numbers: Iterable[int | None]) -> None:
        """An operator that scales cannot pass: what it reads keeps its scale."""
        for number in numbers:
            if number is not None:
                self.fix(self.labels.get(number))
                for views in (self.vectors, self.matrices):
                    if number in views:
                        self.elsewhere.add(views[number][0])

    # Operators -------------------------------------------------------------------------------------------------

    def step(self, node: Node) -> None:
        name = str(node.attrs.get("fn", node.op)).rstrip("_").lower()
        if node.op in MOVES:
            self.move(node)
        elif node.op == "elementwise":
            self.elementwise(node, name)
        elif node.op == "linear":
            axes = (1, 0) if node.attrs.get("layout") == "io" else (0, 1)
            self.product(node, axes, node.inputs[2] if len(node.inputs) > 2 else None)
        elif node.op == "matmul":
            self.matmul(node)
        elif node.op == "attention":
            self.attention(node)
        elif node.op == "layer_norm":
            self.layer_norm(node)
        elif node.op == "reduce" and name in _PASSING_REDUCTIONS:
            self.reduce(node)
        else:
            self.refuse(node.inputs)

    def shape(self, number: int | None) -> tuple[int, ...]:
        assert number is not None
        return self.graph.values[number].shape

    def move(self, node: Node) -> None:
        """Operators that put elements elsewhere and change none."""
        source = node.inputs[0]
        if len(node.inputs) == 1 and source in self.matrices:
            path, axes = self.matrices[source]
            if node.op == "identity":
                self.matrices[node.outputs[0]] = path, axes
            elif node.op == "transpose":
                self.matrices[node.outputs[0]] = path, tuple(axes[p] for p in node.attrs["perm"])
            else:
                self.refuse(node.inputs)
            return
        if any(0 in self.shape(n) for n in (*node.inputs, *node.outputs) if n is not None):
            self.refuse(node.inputs)
            return
        if len(node.inputs) == 1 and source in self.vectors:
            path, index = self.vectors[source]
            index = index.reshape((1,) * (len(self.shape(source)) - index.ndim) + index.shape)
            for number, moved in zip(node.outputs, MOVES[node.op](node, self.shape, [index])):
                self.vectors[number] = path, moved
            return
        if any(n in self.matrices or n in self.vectors for n in node.inputs):
            self.refuse(node.inputs)
            return
        given = [None if n is None else self.labels.get(n) for n in node.inputs]
        if any(one is not None for one in given):
            for number, labels in zip(node.outputs, MOVES[node.op](node, self.shape, given)):
                self.put(number, labels)

    def elementwise(self, node: Node, name: str) -> None:
        inputs = [n for n in node.inputs if n is not None]
        carried = [n for n in inputs if n in self.labels]
        vectors = [n for n in inputs if n in self.vectors]
        out = node.outputs[0]
        if any(n in self.matrices for n in inputs) or len(node.outputs) > 1 or len(inputs) > 2 or len(vectors) > 1:
            self.refuse(inputs)
        elif name == "mul" and vectors and len(inputs) == 2:
            self.refuse(carried)
            path, index = self.vectors[vectors[0]]
            self.put(out, self.writes(path, 0)[index])
        elif name in _SUMS and vectors and carried:
            self.put(out, self.add(vectors[0], self.labels[carried[0]], len(self.shape(out))))
        elif vectors:
            self.refuse(inputs)
        elif not carried:
            return
        elif len(carried) == 1:
            alone = name in (*_ALIKE, "mul", "div") if len(inputs) == 1 else name == "mul"
            if alone or (name == "div" and carried[0] == inputs[0]):
                self.put(out, self.labels[carried[0]])
            else:
                self.refuse(inputs)
        elif name == "mul" and carried[0] != carried[1]:
            self.refuse(carried[:1])
            self.put(out, self.labels[carried[1]])
        elif name in _SUMS and np.array_equal(self.labels[carried[0]], self.labels[carried[1]]):
            self.put(out, self.labels[carried[0]])
        else:
            self.refuse(inputs)

    def add(self, vector: int, labels: Array, rank: int) -> Array | None:
        """A vector that is added to channels is written by what writes them."""
        path, index = self.vectors[vector]
        index, labels = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (index, labels))
        index, labels = np.broadcast_arrays(index, labels)
        channels = np.full(self.graph.shapes[path][0], NONE)
        channels[index.reshape(-1)] = labels.reshape(-1)
        known = self.added.setdefault(path, channels)
        one_each = np.array_equal(channels[index], labels) and not bool((labels == NONE).any())
        if not one_each or not np.array_equal(known, channels):
            self.fix(labels)
            self.elsewhere.add(path)
            return None
        return labels

    def product(self, node: Node, axes: tuple[int, int], bias: int | None) -> None:
        """x times a matrix of two axes, (made, read), of which the value in the graph may be another view."""
        x, weight = node.inputs[0], node.inputs[1]
        if weight not in self.matrices or x in self.matrices or x in self.vectors:
            self.refuse(node.inputs)
            return
        path, own = self.matrices[weight]
        made, read = own[axes[0]], own[axes[1]]
        labels = self.labels.get(x) if x is not None else None
        channels = np.full(self.graph.shapes[path][read], NONE)
        if labels is not None and labels.size == labels.shape[-1]:
            channels = np.array(np.broadcast_to(labels.reshape(-1), channels.shape))
            if len(channels) != labels.size:  # one channel, read as many
                self.fix(labels)
                channels[:] = NONE
        else:
            self.fix(labels)
        self.reads(path, read, channels)
        out: Array | None = self.writes(path, made)
        self.put_biased(node.outputs[0], out, bias)

    def put_biased(self, number: int, out: Array | None, bias: int | None) -> None:
        """A value to which a bias was added, which is scaled as it is where both can be."""
        if bias is not None and bias in self.vectors and out is not None:
            out = self.add(bias, out, 1)
        elif bias is not None:
            self.refuse([bias])
            self.fix(out)
        self.put(number, out)

    def matmul(self, node: Node) -> None:
        a, b = node.inputs[0], node.inputs[1]
        turned = bool(node.attrs.get("transpose_b"))
        if b in self.matrices and not node.attrs.get("transpose_a"):
            self.product(node, (0, 1) if turned else (1, 0), None)
            return
        labels = self.labels.get(b) if b is not None and b not in self.matrices else None
        if labels is None or labels.ndim < 2 or labels.shape[-1 if turned else -2] > 1:
            self.refuse(node.inputs)
            return
        self.refuse([a])
        self.put(node.outputs[0], np.swapaxes(labels, -1, -2) if turned else labels)

    def attention(self, node: Node) -> None:
        values = node.inputs[2]
        self.refuse(n for k, n in enumerate(node.inputs) if k != 2)
        labels = self.labels.get(values) if values is not None else None
        if labels is None or labels.shape[2] > 1:
            self.refuse([values])
            return
        if labels.shape[1] > 1:
            labels = np.repeat(labels, self.shape(node.outputs[0])[1] // labels.shape[1], axis=1)
        self.put(node.outputs[0], labels)

    def layer_norm(self, node: Node) -> None:
        weight, bias = (*node.inputs[1:], None, None)[:2]
        if weight not in self.vectors or list(node.attrs["axes"]) != [len(self.shape(node.inputs[0])) - 1]:
            self.refuse(node.inputs)
            return
        self.refuse(node.inputs[:1])
        path, index = self.vectors[weight]
        out: Array | None = self.writes(path, 0)[index]
        self.put_biased(node.outputs[0], out, bias)

    def reduce(self, node: Node) -> None:
        labels = self.labels.get(node.inputs[0]) if node.inputs[0] is not None else None
        axes = tuple(node.attrs["axes"])
        if labels is None or len(node.outputs) > 1 or any(labels.shape[k] > 1 for k in axes):
            self.refuse(node.inputs)
            return
        self.put(node.outputs[0], labels if node.attrs.get("keepdim") else labels.squeeze(axes))
