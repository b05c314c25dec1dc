"""One rule for each operator of the neutral graph: how its axes relate to one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slimkit.core.dims import ONE, Dim, cut, factor, find, fix, fixed, leaves, product, regroup, total, unify
from slimkit.core.graph import Graph, Node

Dims = list[Dim]

# Reductions whose result depends on which index held what, not only on the values.
BY_INDEX = ("prod", "any", "all", "argmax", "argmin", "median", "count")
SCALE = "inner size of attention, which its scale depends on"
SPACE = "spatial size"


class Relations:
    """Walks a graph once and relates the axes of everything in it.

    Args:
        graph: a traced model.

    Attributes:
        dims: for each value, one axis expression a dimension.
        roles: (parameter, axis) -> "out", "in", "norm", "layer_norm", "bias" or "table".
        outs: parameter of a Conv or Linear -> the axis expression of the channels that layer makes.
        groups: scope -> (attribute, group axis) of grouped convolutions and group norms.
        opaque: (operator, scope) of nodes that no rule covers.
        averaged: axes over which a mean or a similar number is taken.
        costs: multiplications of one node, as a list of axis expressions to be multiplied.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.dims: list[Dims] = [[] for _ in graph.values]
        self.live = [False] * len(graph.values)
        self.origin: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.outs: dict[str, Dim] = {}
        self.groups: dict[str, tuple[str, Dim]] = {}
        self.opaque: list[tuple[str, str]] = []
        self.costs: list[tuple[str, list[Dim]]] = []
        self._scales: list[Dim] = []
        self.averaged: list[Dim] = []
        self.params: dict[str, Dims] = {}
        for number, value in enumerate(graph.values):
            self.dims[number] = self._source(value.kind, value.path, value.shape)
            self.live[number] = value.kind == "input"
            if value.kind == "param":
                self.origin[number] = (value.path, tuple(range(len(value.shape))))
        for node in graph.nodes:
            self._relate(node)
        for number in graph.outputs:
            for dim in self.dims[number]:
                fix(dim, "output of the model")
        for dim in self._scales:
            fix(dim, SCALE)

    def _source(self, kind: str, path: str, shape: tuple[int, ...]) -> Dims:
        if kind == "param":
            if path not in self.params:
                self.params[path] = [Dim(s) if s != 1 else ONE for s in shape]
            return self.params[path]
        if kind == "uniform":
            return [Dim(s, elastic=True) if s != 1 else ONE for s in shape]
        if kind == "result":
            return []
        why = "input of the model" if kind == "input" else "constant made in the model's code"
        return [fixed(s, why) for s in shape]

    def _relate(self, node: Node) -> None:
        inputs: list[Any] = [None if i is None else self.dims[i] for i in node.inputs]
        results = RULES[node.op](self, node, inputs)
        # Looked-up rows are activations even where the tracer knows the indices.
        live = node.op == "embedding" or any(i is not None and self.live[i] for i in node.inputs)
        for number, dims in zip(node.outputs, results):
            shape = self.graph.values[number].shape
            if len(dims) != len(shape) or any(d.size != s for d, s in zip(dims, shape)):
                # A rule that disagrees with the tracer's shape knows less than it thinks.
                self.stay_whole(node, [*inputs, dims])
                dims = [fixed(s, f"unusual {node.op}") for s in shape]
            self.dims[number] = dims
            self.live[number] = live

    def shape(self, node: Node, output: int = 0) -> tuple[int, ...]:
        return self.graph.values[node.outputs[output]].shape

    def role(self, number: int | None, axis: int, role: str) -> None:
        """Remember what a parameter's axis is for, seen through transposes."""
        if number is not None and number in self.origin:
            path, axes = self.origin[number]
            if axis < len(axes):
                self.roles.setdefault((path, axes[axis]), role)

    def layer(self, number: int | None, out: Dim) -> None:
        """Remember which channels the layer of a weight makes."""
        if number is not None and number in self.origin:
            self.outs.setdefault(self.origin[number][0], out)

    def stay_whole(self, node: Node, groups: Sequence[Dims | None]) -> None:
        name = str(node.attrs.get("fn", node.op))
        self.opaque.append((name, node.scope))
        for dims in groups:
            for dim in dims or ():
                fix(dim, f"touched by {name}, for which there is no rule")


def same(a: Dim, b: Dim, why: str = "axes of unequal size") -> Dim:
    """Unify two axes where their sizes allow it; otherwise both stay whole."""
    if a.size == b.size:
        unify(a, b)
    else:
        fix(a, why)
        fix(b, why)
    return a


def _elementwise(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    rank = max(len(d) for d in x if d is not None)
    out: Dims = [ONE] * rank
    for dims in x:
        for place, dim in enumerate(dims or (), rank - len(dims or ())):
            if dim.size == 1:
                continue
            if out[place].size == 1:
                out[place] = dim
            else:
                same(out[place], dim)
    return [out] * len(node.outputs)


def _identity(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    if node.inputs[0] in r.origin:
        r.origin[node.outputs[0]] = r.origin[node.inputs[0]]
    return [list(x[0])]


def _reshape(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    return [regroup(x[0], r.shape(node))]


def _transpose(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    perm = node.attrs["perm"]
    if node.inputs[0] in r.origin:
        path, axes = r.origin[node.inputs[0]]
        r.origin[node.outputs[0]] = (path, tuple(axes[p] for p in perm))
    return [[x[0][p] for p in perm]]


def _expand(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    shape = r.shape(node)
    old = [ONE] * (len(shape) - len(x[0])) + x[0]
    return [[d if d.size == s else Dim(s, elastic=True) for d, s in zip(old, shape)]]


def _repeat(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    return [[product([fixed(n, "number of repetitions"), d]) for n, d in zip(node.attrs["repeats"], x[0])]]


def _concat(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    x = [d for d in x if d is not None and len(d) > axis]
    out = list(x[0])
    for other in x[1:]:
        for place, dim in enumerate(other):
            if place != axis:
                same(out[place], dim)
    out[axis] = total([d[axis] for d in x])
    return [out]


def _stack(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    for other in x[1:]:
        for a, b in zip(x[0], other):
            same(a, b)
    out = list(x[0])
    out.insert(axis, fixed(len(x), "number of stacked tensors"))
    return [out]


def _split(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis, rest, out = node.attrs["axis"], x[0][node.attrs["axis"]], []
    for size in node.attrs["sizes"]:
        pair = cut(rest, size)
        if pair is None:
            fix(x[0][axis], "split in a way that no expression can say")
            return [[*x[0][:axis], fixed(s, "split"), *x[0][axis + 1 :]] for s in node.attrs["sizes"]]
        out.append([*x[0][:axis], pair[0], *x[0][axis + 1 :]])
        rest = pair[1]
    return out


def _slice(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis, start, stop, step = (node.attrs[k] for k in ("axis", "start", "stop", "step"))
    dim = x[0][axis]
    size = r.shape(node)[axis]
    head = cut(dim, start)
    body = head and cut(head[1], stop - start)
    kept = body and body[0]
    if kept and step > 1:
        pair = factor(kept, size) if size * step == kept.size else None
        if pair:
            fix(pair[1], "taken in steps")
        kept = pair and pair[0]
    if kept is None:
        fix(dim, "sliced in a way that no expression can say")
        kept = fixed(size, "slice")
    return [[*x[0][:axis], kept, *x[0][axis + 1 :]]]


def _select(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    fix(x[0][axis], "read by number")
    return [[*x[0][:axis], *x[0][axis + 1 :]]] * len(node.outputs)


def _pad(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pads = node.attrs["pads"]
    if any(p < 0 for pair in pads for p in pair):
        r.stay_whole(node, x)
        return [[fixed(s, "negative padding") for s in r.shape(node)]]
    return [[total([fixed(a, "padding"), d, fixed(b, "padding")]) for (a, b), d in zip(pads, x[0])]]


def _linear(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    o, i = (1, 0) if node.attrs.get("layout") == "io" else (0, 1)
    weight = x[1]
    same(x[0][-1], weight[i])
    out = weight[o]
    r.role(node.inputs[1], o, "out")
    r.role(node.inputs[1], i, "in")
    r.layer(node.inputs[1], out)
    if len(x) > 2 and x[2]:
        same(out, x[2][-1])
        r.role(node.inputs[2], len(x[2]) - 1, "bias")
    r.costs.append((node.scope, [*x[0], out]))
    return [[*x[0][:-1], out]]


def _matmul(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    a, b = x[0], x[1]
    if len(a) == 1:
        a = [ONE, *a]
    if len(b) == 1:
        b = [*b, ONE]
    if node.attrs.get("transpose_a"):
        a = [*a[:-2], a[-1], a[-2]]
    if node.attrs.get("transpose_b"):
        b = [*b[:-2], b[-1], b[-2]]
    same(a[-1], b[-2])
    batch = _elementwise(r, node, [a[:-2], b[:-2]])[0] if len(a) > 2 or len(b) > 2 else []
    both = r.live[node.inputs[0]] and r.live[node.inputs[1]]  # type: ignore[index]
    if both:
        r._scales.append(a[-1])
        for leaf in leaves(b[-1]):
            leaf.inner = True
    for side, plain in ((1, node.attrs.get("transpose_b")), (0, node.attrs.get("transpose_a"))):
        rank = len(x[side])
        inner = rank - 2 if (side == 1) != bool(plain) else rank - 1
        outer = rank - 1 if inner == rank - 2 else rank - 2
        if not r.live[node.inputs[side]] and rank >= 2:  # type: ignore[index]
            r.role(node.inputs[side], inner, "in")
            r.role(node.inputs[side], outer, "out")
            r.layer(node.inputs[side], x[side][outer])
    r.costs.append((node.scope, [*batch, a[-2], a[-1], b[-1]]))
    out = [*batch, a[-2], b[-1]]
    if len(x[0]) == 1:
        out.pop(-2)
    if len(x[1]) == 1:
        out.pop(-1)
    return [out]


def _conv(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    data, weight, groups = x[0], x[1], node.attrs.get("groups", 1)
    transposed = node.attrs.get("transposed", False)
    made, read = (1, 0) if transposed else (0, 1)
    for dim in (*data[2:], *weight[2:]):
        fix(dim, SPACE)
    if groups == 1:
        same(data[1], weight[read])
        out = weight[made]
    else:
        # `whole` runs over groups times channels a group; the other axis of the weight holds one group's channels.
        whole, part = (weight[0], weight[1])
        outer = factor(data[1], groups), factor(whole, groups)
        if outer[0] is None or outer[1] is None:
            for dim in (data[1], *weight[:2]):
                fix(dim, "grouped convolution over parts of unequal make")
            out = fixed(r.shape(node)[1], "grouped convolution")
        else:
            unify(outer[0][0], outer[1][0])
            group = find(outer[1][0])
            if transposed:
                unify(outer[0][1], outer[1][1])
                out = product([group, part])
            else:
                unify(outer[0][1], part)
                out = whole
            r.groups[_module(r, node)] = ("groups", group)
    r.role(node.inputs[1], made, "out")
    r.role(node.inputs[1], read, "in")
    if groups > 1 and transposed:
        r.role(node.inputs[1], 0, "out")
    r.layer(node.inputs[1], out)
    if len(x) > 2 and x[2]:
        same(out, x[2][0])
        r.role(node.inputs[2], 0, "bias")
    space = [fixed(s, SPACE) for s in r.shape(node)[2:]]
    r.costs.append((node.scope, [data[0], *(data[2:] if transposed else space), *weight]))
    return [[data[0], out, *space]]


def _module(r: Relations, node: Node) -> str:
    """The module a parametrised operator belongs to: its weight's, else the one whose code ran it."""
    for number in node.inputs[1:]:
        if number in r.origin:
            return r.origin[number][0].rpartition(".")[0]  # type: ignore[index]
    return node.scope


def _norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs.get("axes", [1])[0]
    for number, dims in zip(node.inputs[1:], x[1:]):
        if dims:
            same(x[0][axis], dims[0])
            r.role(number, 0, "norm")
    return [list(x[0])] + [[fixed(s, "statistics") for s in r.shape(node, k)] for k in range(1, len(node.outputs))]


def _layer_norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axes = node.attrs["axes"]
    for number, dims in zip(node.inputs[1:], x[1:]):
        for place, (axis, dim) in enumerate(zip(axes, dims or ())):
            same(x[0][axis], dim)
            r.role(number, place, "layer_norm")
    return [list(x[0])] + [[fixed(s, "statistics") for s in r.shape(node, k)] for k in range(1, len(node.outputs))]


def _group_norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pair = factor(x[0][1], node.attrs["groups"])
    if pair is None:
        fix(x[0][1], "group norm over parts of unequal make")
    elif node.attrs["groups"] > 1:
        r.groups[_module(r, node)] = ("num_groups", pair[0])
    return _norm(r, node, x)


def _pool(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    space = node.attrs["space"]
    for dim in x[0][len(x[0]) - space :]:
        fix(dim, SPACE)
    shape = r.shape(node)
    keep = x[0][: len(x[0]) - space]
    return [[*keep, *(fixed(s, SPACE) for s in shape[len(shape) - space :])]] * len(node.outputs)


def _reduce(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axes, fn = set(node.attrs["axes"]), str(node.attrs.get("fn", "mean"))
    for axis in axes if fn in BY_INDEX else ():
        fix(x[0][axis], f"reduced by {fn}")
    if fn != "sum":
        r.averaged.extend(x[0][axis] for axis in axes)
    out = [ONE if i in axes else d for i, d in enumerate(x[0]) if i not in axes or node.attrs.get("keepdim")]
    return [out] * len(node.outputs)


def _along(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    for axis in node.attrs["axes"]:
        fix(x[0][axis], f"{node.attrs.get('fn', 'order')} runs along it")
    first = list(x[0])
    out = []
    for k in range(len(node.outputs)):
        shape = r.shape(node, k)
        if len(shape) == len(first):
            out.append([d if d.size == s else fixed(s, str(node.attrs.get("fn"))) for d, s in zip(first, shape)])
        else:
            out.append([fixed(s, str(node.attrs.get("fn"))) for s in shape])
    return out


def _embedding(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    fix(x[0][0], "rows are looked up by number")
    r.role(node.inputs[0], 0, "table")
    r.role(node.inputs[0], 1, "out")
    return [[*x[1], *x[0][1:]]]


def _gather(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    fix(x[0][axis], "read by index")
    n_new = len(r.shape(node)) - len(x[0]) + 1
    fresh = [fixed(s, "index") for s in r.shape(node)[axis : axis + n_new]]
    return [[*x[0][:axis], *fresh, *x[0][axis + 1 :]]]


def _scatter(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis, shape = node.attrs["axis"], r.shape(node)
    out = []
    for place, size in enumerate(shape):
        here = [d[place] for d in x if d and len(d) == len(shape)]
        if place == axis or any(d.size not in (size, 1) for d in here):
            for dim in here:
                fix(dim, "read or written by index")
            out.append(fixed(size, "read or written by index"))
            continue
        wide = [d for d in here if d.size == size]
        for other in wide[1:]:
            unify(wide[0], other)
        out.append(wide[0] if wide else fixed(size, "index"))
    return [out]


def _attention(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    q, k, v = x[0], x[1], x[2]
    same(q[0], k[0])
    same(k[0], v[0])
    same(k[1], v[1])
    same(k[2], v[2])
    same(q[3], k[3])
    pair = factor(q[1], k[1].size)
    if pair is None:
        fix(q[1], "heads in unequal groups")
        fix(k[1], "heads in unequal groups")
    else:
        unify(pair[0], k[1])
        fix(pair[1], "query heads for each key head")
    if len(x) > 3 and x[3]:
        for a, b in zip(x[3][::-1], (k[2], q[2], q[1], q[0])):
            if a.size > 1:
                same(a, b)
    r._scales.append(q[3])
    for leaf in leaves(v[3]):
        leaf.inner = True
    r.costs.append((node.scope, [q[0], q[1], q[2], k[2], q[3]]))
    r.costs.append((node.scope, [q[0], q[1], q[2], k[2], v[3]]))
    out = [[q[0], q[1], q[2], v[3]]]
    return out + [[fixed(s, "statistics") for s in r.shape(node, n)] for n in range(1, len(node.outputs))]


def _pixel_shuffle(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    shape, f, dims = r.shape(node), node.attrs["factor"], x[0]
    lead = dims[:-3]
    if node.attrs.get("inverse"):
        channels = product([dims[-3], fixed(f * f, "pixels")])
    else:
        pair = factor(dims[-3], dims[-3].size // (f * f))
        if pair is None:
            fix(dims[-3], "pixel shuffle over parts of unequal make")
            channels = fixed(shape[-3], "pixel shuffle")
        else:
            channels = pair[0]
            fix(pair[1], "pixels")
    return [[*lead, channels, fixed(shape[-2], SPACE), fixed(shape[-1], SPACE)]]


def _channel_shuffle(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pair = factor(x[0][1], node.attrs["groups"])
    if pair is None:
        fix(x[0][1], "shuffled over parts of unequal make")
        return [list(x[0])]
    fix(pair[0], "number of shuffled groups")
    return [[x[0][0], product([pair[1], pair[0]]), *x[0][2:]]]


def _unfold(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    for dim in x[0][2:]:
        fix(dim, SPACE)
    shape = r.shape(node)
    return [[x[0][0], product([x[0][1], fixed(node.attrs["kernel"], "kernel")]), fixed(shape[-1], SPACE)]]


def _opaque(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    r.stay_whole(node, x)
    name = str(node.attrs.get("fn", node.op))
    return [
        [fixed(s, f"made by {name}, for which there is no rule") for s in r.shape(node, k)]
        for k in range(len(node.outputs))
    ]


RULES: dict[str, Callable[[Relations, Node, list[Any]], list[Dims]]] = {
    "elementwise": _elementwise,
    "identity": _identity,
    "reshape": _reshape,
    "transpose": _transpose,
    "expand": _expand,
    "repeat": _repeat,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "slice": _slice,
    "select": _select,
    "unbind": _select,
    "pad": _pad,
    "linear": _linear,
    "matmul": _matmul,
    "conv": _conv,
    "norm": _norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "pool": _pool,
    "reduce": _reduce,
    "along": _along,
    "embedding": _embedding,
    "gather": _gather,
    "scatter": _scatter,
    "attention": _attention,
    "pixel_shuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
    "unfold": _unfold,
    "opaque": _opaque,
}
