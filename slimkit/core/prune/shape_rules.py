"""Rules of the operators without weights: how they rearrange, join, divide and reduce axes."""

from __future__ import annotations

from collections.abc import Sequence

from slimkit.core.prune.dims import ONE, Dim, cut, divided, factor, fix, fixed, product, same, total
from slimkit.core.prune.graph import Node
from slimkit.core.prune.regroup import regroup
from slimkit.core.prune.relations import Dims, Partial, Relations

# Reductions whose result depends on which index held what, not only on the values.
BY_INDEX = ("prod", "any", "all", "argmax", "argmin", "median", "count")


def broadcast(node: Node, x: Sequence[Dims | None]) -> list[Dims]:
    """Axes broadcast as in NumPy."""
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


def elementwise(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    given = [i for i in node.inputs if i is not None]
    if not any(r.live[i] for i in given):
        # A weight that is computed (weight normalisation, a mask over it) is the weight still.
        like = [i for i in given if r.weight(i) and r.graph.values[i].shape == r.shape(node)]
        if like:
            r.origin[node.outputs[0]] = r.origin[like[0]]
    return broadcast(node, x)


def identity(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    if node.inputs[0] in r.origin:
        r.origin[node.outputs[0]] = r.origin[node.inputs[0]]
    return [list(x[0])]


def reshape(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    return [regroup(x[0], r.shape(node))]


def transpose(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    perm = node.attrs["perm"]
    if node.inputs[0] in r.origin:
        path, axes = r.origin[node.inputs[0]]
        r.origin[node.outputs[0]] = (path, tuple(axes[p] for p in perm))
    return [[x[0][p] for p in perm]]


def expand(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    shape = r.shape(node)
    old = [ONE] * (len(shape) - len(x[0])) + x[0]
    return [[d if d.size == s else Dim(s, elastic=True) for d, s in zip(old, shape)]]


def repeat(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    return [[product([fixed(n, "number of repetitions"), d]) for n, d in zip(node.attrs["repeats"], x[0])]]


def concat(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    x = [d for d in x if d is not None and len(d) > axis]
    out = list(x[0])
    for other in x[1:]:
        for place, dim in enumerate(other):
            if place != axis:
                same(out[place], dim)
    out[axis] = total([d[axis] for d in x])
    return [out]


def stack(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    for other in x[1:]:
        for a, b in zip(x[0], other):
            same(a, b)
    out = list(x[0])
    out.insert(axis, fixed(len(x), "number of stacked tensors"))
    return [out]


def split(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis, rest, out = node.attrs["axis"], x[0][node.attrs["axis"]], []
    if node.inputs[0] in r.origin:
        for number in node.outputs:
            r.origin[number] = r.origin[node.inputs[0]]
    for size in node.attrs["sizes"]:
        pair = cut(rest, size)
        if pair is None:
            fix(x[0][axis], "split in a way that no expression can say")
            return [[*x[0][:axis], fixed(s, "split"), *x[0][axis + 1 :]] for s in node.attrs["sizes"]]
        out.append([*x[0][:axis], pair[0], *x[0][axis + 1 :]])
        rest = pair[1]
    return out


def slice(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis, start, stop, step = (node.attrs[k] for k in ("axis", "start", "stop", "step"))
    dim = x[0][axis]
    size = r.shape(node)[axis]
    if node.inputs[0] in r.origin:
        r.origin[node.outputs[0]] = r.origin[node.inputs[0]]
    parts = divided(dim, (start, stop))
    head = cut(dim, start)
    body = head and cut(head[1], stop - start)
    if head and body:
        r.partial.append(Partial(parts, [head[0], body[1]]))
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


def select(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    fix(x[0][axis], "read by number")
    return [[*x[0][:axis], *x[0][axis + 1 :]]] * len(node.outputs)


def pad(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pads = node.attrs["pads"]
    if any(p < 0 for pair in pads for p in pair):
        r.stay_whole(node, x)
        return [[fixed(s, "negative padding") for s in r.shape(node)]]
    return [[total([fixed(a, "padding"), d, fixed(b, "padding")]) for (a, b), d in zip(pads, x[0])]]


def reduce(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axes, fn = set(node.attrs["axes"]), str(node.attrs.get("fn", "mean"))
    for axis in axes if fn in BY_INDEX else ():
        fix(x[0][axis], f"reduced by {fn}")
    if fn != "sum":
        r.averaged.extend(x[0][axis] for axis in axes)
    out = [ONE if i in axes else d for i, d in enumerate(x[0]) if i not in axes or node.attrs.get("keepdim")]
    return [out] * len(node.outputs)


def along(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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
