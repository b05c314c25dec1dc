"""Rules of the operators with weights, and of those that give axes a meaning: convolution, attention, norms, tables."""

from __future__ import annotations

from slimkit.core.prune.dims import ONE, factor, find, fix, fixed, leaves, product, same, unify
from slimkit.core.prune.graph import Node
from slimkit.core.prune.relations import Dims, Relations, Score
from slimkit.core.prune.shape_rules import elementwise

SPACE = "spatial size"


def linear(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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


def matmul(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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
    batch = elementwise(r, node, [a[:-2], b[:-2]])[0] if len(a) > 2 or len(b) > 2 else []
    both = r.live[node.inputs[0]] and r.live[node.inputs[1]]  # type: ignore[index]
    if both:
        r.scales.append(a[-1])
        for leaf in leaves(b[-1]):
            leaf.inner = True
    else:
        # A softmax may follow: learned queries, keys from parameters alone, memory slots.
        rows = next((d for d, i in ((a[-2], node.inputs[0]), (b[-1], node.inputs[1])) if r.weight(i)), None)
        r.scores[node.outputs[0]] = [Score(a[-1], rows)]
    r.attends(node.inputs[0], b[-1], bare=r.weight(node.inputs[1]))
    r.attends(node.inputs[1], a[-2], bare=r.weight(node.inputs[0]))
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


def conv(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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
            r.groups[module_of(r, node)] = ("groups", group)
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


def module_of(r: Relations, node: Node) -> str:
    """The module a parametrised operator belongs to: its weight's, else the one whose code ran it."""
    for number in node.inputs[1:]:
        if number in r.origin:
            return r.origin[number][0].rpartition(".")[0]
    return node.scope


def norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs.get("axes", [1])[0]
    if not r.live[node.inputs[0]]:  # type: ignore[index]
        # A standardised weight: dropping inputs changes the mean and spread of what is left.
        r.averaged.extend(d for place, d in enumerate(x[0]) if place != axis)
    for number, dims in zip(node.inputs[1:], x[1:]):
        if dims:
            same(x[0][axis], dims[0])
            r.role(number, 0, "norm")
    return [list(x[0])] + [[fixed(s, "statistics") for s in r.shape(node, k)] for k in range(1, len(node.outputs))]


def layer_norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axes = node.attrs["axes"]
    for number, dims in zip(node.inputs[1:], x[1:]):
        for place, (axis, dim) in enumerate(zip(axes, dims or ())):
            same(x[0][axis], dim)
            r.role(number, place, "layer_norm")
    return [list(x[0])] + [[fixed(s, "statistics") for s in r.shape(node, k)] for k in range(1, len(node.outputs))]


def group_norm(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pair = factor(x[0][1], node.attrs["groups"])
    if pair is None:
        fix(x[0][1], "group norm over parts of unequal make")
    else:
        r.averaged.append(pair[1])
    if pair is not None and node.attrs["groups"] > 1:
        r.groups[module_of(r, node)] = ("num_groups", pair[0])
    return norm(r, node, x)


def pool(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    space = node.attrs["space"]
    for dim in x[0][len(x[0]) - space :]:
        fix(dim, SPACE)
    shape = r.shape(node)
    keep = x[0][: len(x[0]) - space]
    return [[*keep, *(fixed(s, SPACE) for s in shape[len(shape) - space :])]] * len(node.outputs)


def embedding(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    fix(x[0][0], "rows are looked up by number")
    r.made.extend(x[0][1:])
    r.role(node.inputs[0], 0, "table")
    r.role(node.inputs[0], 1, "out")
    return [[*x[1], *x[0][1:]]]


def gather(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    axis = node.attrs["axis"]
    fix(x[0][axis], "read by index")
    if axis == 0 and r.weight(node.inputs[0]):
        r.made.extend(x[0][1:])  # a table, read like an embedding's
    n_new = len(r.shape(node)) - len(x[0]) + 1
    fresh = [fixed(s, "index") for s in r.shape(node)[axis : axis + n_new]]
    return [[*x[0][:axis], *fresh, *x[0][axis + 1 :]]]


def scatter(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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


def attention(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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
    r.scales.append(q[3])
    for leaf in leaves(v[3]):
        leaf.inner = True
    r.costs.append((node.scope, [q[0], q[1], q[2], k[2], q[3]]))
    r.costs.append((node.scope, [q[0], q[1], q[2], k[2], v[3]]))
    out = [[q[0], q[1], q[2], v[3]]]
    return out + [[fixed(s, "statistics") for s in r.shape(node, n)] for n in range(1, len(node.outputs))]


def pixel_shuffle(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
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


def channel_shuffle(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    pair = factor(x[0][1], node.attrs["groups"])
    if pair is None:
        fix(x[0][1], "shuffled over parts of unequal make")
        return [list(x[0])]
    fix(pair[0], "number of shuffled groups")
    return [[x[0][0], product([pair[1], pair[0]]), *x[0][2:]]]


def unfold(r: Relations, node: Node, x: list[Dims]) -> list[Dims]:
    for dim in x[0][2:]:
        fix(dim, SPACE)
    shape = r.shape(node)
    return [[x[0][0], product([x[0][1], fixed(node.attrs["kernel"], "kernel")]), fixed(shape[-1], SPACE)]]
