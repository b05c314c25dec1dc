"""Rules for products, convolutions, norms, pooling, reductions, tables and attention."""

from __future__ import annotations

from typing import Any

from slimkit_ms.trace.builder import Builder, Entry, NotSaid, axes_of, axis_of, parts_of, shape_of
from slimkit_ms.trace.mindir import Record


def matmul(b: Builder, r: Record) -> Entry:
    x, y = b.need(r, 0), b.need(r, 1)
    transpose_a, transpose_b = bool(b.arg(r, 2, "transpose_a", False)), bool(b.arg(r, 3, "transpose_b", False))
    if b.graph.values[y].kind == "param" and len(b.shape(y)) == 2 and not transpose_a:
        return linear_node(b, r, x, y, None, "oi" if transpose_b else "io")
    return b.one("matmul", [x, y], shape_of(r), r.scope, transpose_a=transpose_a, transpose_b=transpose_b)


def matmul_ext(b: Builder, r: Record) -> Entry:
    x, y = b.need(r, 0), b.need(r, 1)
    if b.graph.values[y].kind == "param" and len(b.shape(y)) == 2:
        return linear_node(b, r, x, y, None, "io")
    if min(len(b.shape(x)), len(b.shape(y))) < 2:
        raise NotSaid("a product with a vector")
    return b.one("matmul", [x, y], shape_of(r), r.scope)


def dense(b: Builder, r: Record) -> Entry:
    return linear_node(b, r, b.need(r, 0), b.need(r, 1), b.tensor(r, 2), "oi")


def linear_node(b: Builder, r: Record, x: int, weight: int, bias: int | None, layout: str) -> int:
    # Only the other layout is an attribute, as the vocabulary has it.
    attrs = {"layout": "io"} if layout == "io" else {}
    return b.one("linear", [x, weight, bias], shape_of(r), r.scope, **attrs)


def conv(b: Builder, r: Record, transposed: bool = False) -> Entry:
    if str(r.attrs.get("format", "NCHW")).startswith("NH") or r.attrs.get("format") == "NDHWC":
        raise NotSaid("channels last")
    groups = int(r.attrs.get("group", r.attrs.get("groups", 1)) or 1)
    inputs = [b.need(r, 0), b.need(r, 1), None]
    return b.one("conv", inputs, shape_of(r), r.scope, groups=groups, transposed=transposed)


def conv_ext(b: Builder, r: Record, place: int, transposed: bool = False, transposed_place: int | None = None) -> Entry:
    """The extended family takes everything as inputs: (x, weight, bias, stride, padding, ..., groups)."""
    groups = int(b.arg(r, place, "groups", 1))
    if transposed_place is not None:
        transposed = bool(b.arg(r, transposed_place, "transposed", False))
    inputs = [b.need(r, 0), b.need(r, 1), b.tensor(r, 2)]
    return b.one("conv", inputs, shape_of(r), r.scope, groups=groups, transposed=transposed)


def batch_norm(b: Builder, r: Record) -> Entry:
    inputs = [b.tensor(r, i) for i in range(5)]
    return parts_of(r, b.one("norm", inputs, shape_of(r, 0), r.scope, axes=(1,)))


def layer_norm(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    rank = len(b.shape(x))
    begin = axis_of(int(b.arg(r, 3, "begin_norm_axis", -1)), rank)
    inputs = [x, b.tensor(r, 1), b.tensor(r, 2)]
    return parts_of(r, b.one("layer_norm", inputs, shape_of(r, 0), r.scope, axes=tuple(range(begin, rank))))


def layer_norm_ext(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    rank = len(b.shape(x))
    axes = tuple(range(rank - len(b.arg(r, 1, "normalized_shape")), rank))
    return parts_of(r, b.one("layer_norm", [x, b.tensor(r, 2), b.tensor(r, 3)], shape_of(r, 0), r.scope, axes=axes))


def rms_norm(b: Builder, r: Record) -> Entry:
    x, gamma = b.need(r, 0), b.need(r, 1)
    rank = len(b.shape(x))
    axes = tuple(range(rank - len(b.shape(gamma)), rank))
    return parts_of(r, b.one("layer_norm", [x, gamma, None], shape_of(r, 0), r.scope, axes=axes, centred=False))


def group_norm(b: Builder, r: Record) -> Entry:
    inputs, groups = [b.need(r, 0), b.tensor(r, 2), b.tensor(r, 3)], int(b.arg(r, 1, "num_groups"))
    return parts_of(r, b.one("group_norm", inputs, shape_of(r, 0), r.scope, groups=groups))


def pool(b: Builder, r: Record, space: int = 2) -> Entry:
    """Pooling and resizing; of (values, indices) both have the input's channels."""
    x = b.need(r, 0)
    if isinstance(r.shapes, list):
        return [b.one("pool", [x], shape_of(r, i), r.scope, space=space) for i in range(len(r.shapes))]
    return b.one("pool", [x], shape_of(r), r.scope, space=space)


def reduce(b: Builder, r: Record, fn: str, axis_place: int = 1, keep_place: int = 2) -> Entry:
    x = b.need(r, 0)
    axes = axes_of(b.arg(r, axis_place, "axis"), len(b.shape(x)))
    keepdim = bool(b.arg(r, keep_place, "keep_dims", False))
    if isinstance(r.shapes, list):
        return [
            b.one("reduce", [x], shape_of(r, i), r.scope, axes=axes, keepdim=keepdim, fn=fn)
            for i in range(len(r.shapes))
        ]
    return b.one("reduce", [x], shape_of(r), r.scope, axes=axes, keepdim=keepdim, fn=fn)


def along(b: Builder, r: Record, place: int = 1, name: str = "axis", default: Any = -1) -> Entry:
    x = b.need(r, 0)
    axes = axes_of(b.arg(r, place, name, default), len(b.shape(x)))
    if isinstance(r.shapes, list):
        return [b.one("along", [x], shape_of(r, i), r.scope, axes=axes, fn=r.op) for i in range(len(r.shapes))]
    return b.one("along", [x], shape_of(r), r.scope, axes=axes, fn=r.op)


def gather(b: Builder, r: Record) -> Entry:
    table, index = b.need(r, 0), b.need(r, 1)
    axis = axis_of(int(b.arg(r, 2, "axis", 0)), len(b.shape(table)))
    if int(b.arg(r, 3, "batch_dims", 0) or 0):
        raise NotSaid("a gather with batch axes")
    if axis == 0 and b.graph.values[table].kind == "param":
        return b.one("embedding", [table, index], shape_of(r), r.scope)
    return b.one("gather", [table, index], shape_of(r), r.scope, axis=axis)


def embedding(b: Builder, r: Record) -> Entry:
    return b.one("embedding", [b.need(r, 1), b.need(r, 0)], shape_of(r), r.scope)


def flash_attention(b: Builder, r: Record) -> Entry:
    """Fused attention; heads inside the width are unfolded first and folded again after."""
    layout = {0: "BSH", 1: "BNSD", 2: "SBH", 3: "BSND"}.get(b.arg(r, 16, "input_layout", 0), "?")
    layout = layout if not isinstance(b.arg(r, 16, "input_layout", 0), str) else b.arg(r, 16, "input_layout")
    heads, shape = int(b.arg(r, 10, "head_num")), shape_of(r, 3)
    q, k, v = (b.need(r, i) for i in range(3))
    perm = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3)}.get(layout)
    if perm is None:
        raise NotSaid(f"layout {layout}")
    size = b.shape(q)[-1] // heads if layout in ("BSH", "SBH") else b.shape(q)[-1]

    def unfold(x: int) -> int:
        if layout in ("BSH", "SBH"):
            x = b.one("reshape", [x], (*b.shape(x)[:2], b.shape(x)[2] // size, size), r.scope)
        return permuted(b, r, x, perm)

    q, k, v = unfold(q), unfold(k), unfold(v)
    mask = b.tensor(r, 6)
    y = b.one("attention", [q, k, v, mask], (*b.shape(q)[:3], b.shape(v)[3]), r.scope)
    y = permuted(b, r, y, tuple(perm.index(i) for i in range(4)))
    if layout in ("BSH", "SBH"):
        y = b.one("reshape", [y], shape, r.scope)
    return parts_of(r, y, main=3)


def permuted(b: Builder, r: Record, x: int, perm: tuple[int, ...]) -> int:
    if perm == tuple(range(len(perm))):
        return x
    shape = b.shape(x)
    return b.one("transpose", [x], tuple(shape[p] for p in perm), r.scope, perm=perm)


def pixel_shuffle(b: Builder, r: Record) -> Entry:
    factor = int(b.arg(r, 1, "upscale_factor"))
    return b.one("pixel_shuffle", [b.need(r, 0)], shape_of(r), r.scope, factor=factor)


def depth_to_space(b: Builder, r: Record, inverse: bool = False) -> Entry:
    """Block offsets lie outside the channels here, unlike in a pixel shuffle: (block, block, channel)."""
    x, shape = b.need(r, 0), shape_of(r)
    n, f = b.shape(x)[0], int(r.attrs["block_size"])
    if inverse:
        c, h, w = b.shape(x)[1], shape[2], shape[3]
        x = b.one("reshape", [x], (n, c, h, f, w, f), r.scope)
        x = permuted(b, r, x, (0, 3, 5, 1, 2, 4))
    else:
        c, h, w = shape[1], b.shape(x)[2], b.shape(x)[3]
        x = b.one("reshape", [x], (n, f, f, c, h, w), r.scope)
        x = permuted(b, r, x, (0, 3, 4, 1, 5, 2))
    return b.one("reshape", [x], shape, r.scope)
