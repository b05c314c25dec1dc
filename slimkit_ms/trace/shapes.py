"""Rules for operators that regroup, reorder, repeat, join or cut axes."""

from __future__ import annotations

from slimkit_ms.trace.builder import Builder, Entry, NotSaid, axis_of, shape_of
from slimkit_ms.trace.mindir import Record


def reshape(b: Builder, r: Record) -> Entry:
    return b.one("reshape", [b.need(r, 0)], shape_of(r), r.scope)


def transpose(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    rank = len(b.shape(x))
    perm = [axis_of(int(p), rank) for p in b.arg(r, 1, "perm")]
    return b.one("transpose", [x], shape_of(r), r.scope, perm=tuple(perm))


def swap(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    perm = list(range(len(b.shape(x))))
    i, j = (int(b.arg(r, p, "", d)) if len(r.inputs) > p else d for p, d in ((1, 0), (2, 1)))
    perm[i], perm[j] = perm[j], perm[i]
    return b.one("transpose", [x], shape_of(r), r.scope, perm=tuple(perm))


def expand(b: Builder, r: Record) -> Entry:
    return b.one("expand", [b.need(r, 0)], shape_of(r), r.scope)


def tile(b: Builder, r: Record) -> Entry:
    """Repetition of whole axes; of an axis of one it is a broadcast, which lets the axis take any size."""
    x, shape = b.need(r, 0), shape_of(r)
    before = (1,) * (len(shape) - len(b.shape(x))) + b.shape(x)
    if before != b.shape(x):
        x = b.one("reshape", [x], before, r.scope)
    repeats = tuple(s // max(p, 1) for s, p in zip(shape, before, strict=True))
    if all(n == 1 for n in repeats):
        return x
    if all(n == 1 or p == 1 for n, p in zip(repeats, before, strict=True)):
        return b.one("expand", [x], shape, r.scope)
    return b.one("repeat", [x], shape, r.scope, repeats=repeats)


def repeat_interleave(b: Builder, r: Record) -> Entry:
    """Each index n times in a row: a new inner axis, broadcast, then flattened into the old one."""
    x, shape = b.need(r, 0), shape_of(r)
    before, times, dim = b.shape(x), b.arg(r, 1, "repeats"), b.arg(r, 2, "dim")
    if not isinstance(times, int) or dim is None:
        raise NotSaid("repeats that differ by index")
    dim = axis_of(int(dim), len(before))
    x = b.one("reshape", [x], (*before[: dim + 1], 1, *before[dim + 1 :]), r.scope)
    x = b.one("expand", [x], (*before[: dim + 1], times, *before[dim + 1 :]), r.scope)
    return b.one("reshape", [x], shape, r.scope)


def concat(b: Builder, r: Record, stack: bool = False) -> Entry:
    parts = b.entry(r.inputs[0])
    if not isinstance(parts, list):
        raise NotSaid("what is joined is no tuple")
    shape = shape_of(r)
    axis = axis_of(int(b.arg(r, 1, "axis", 0)), len(shape))
    return b.one("stack" if stack else "concat", [b.number(p) for p in parts], shape, r.scope, axis=axis)


def split(b: Builder, r: Record, axis_place: int, axis_name: str) -> Entry:
    x = b.need(r, 0)
    axis = axis_of(int(b.arg(r, axis_place, axis_name, 0)), len(b.shape(x)))
    shapes = [shape_of(r, i) for i in range(len(r.shapes))]
    return list(b.emit("split", [x], shapes, r.scope, axis=axis, sizes=tuple(s[axis] for s in shapes)))


def unstack(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    axis = axis_of(int(b.arg(r, 1, "axis", 0)), len(b.shape(x)))
    return list(b.emit("unbind", [x], [shape_of(r, i) for i in range(len(r.shapes))], r.scope, axis=axis))


def strided_slice(b: Builder, r: Record) -> Entry:
    """Python's own indexing, its masks as in the operator's documentation."""
    x = b.need(r, 0)
    begin, end, strides = (list(b.arg(r, i, n)) for i, n in ((1, "begin"), (2, "end"), (3, "strides")))
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    masks = [int(b.arg(r, 4 + i, n, 0) or 0) for i, n in enumerate(names)]
    first, last, ellipsis, new, shrink = [[bool(m >> i & 1) for i in range(len(begin))] for m in masks]
    consumed = sum(not (e or n) for e, n in zip(ellipsis, new, strict=True))
    axis, shape, dropped = 0, list(b.shape(x)), []
    for i in range(len(begin)):
        if ellipsis[i]:
            axis += len(b.shape(x)) - consumed
        elif not new[i]:
            size = shape[axis]
            if shrink[i]:
                x = sliced(b, r, x, axis, begin[i] % size, begin[i] % size + 1, 1)
                dropped.append(axis)
            else:
                start, stop, step = slice(
                    None if first[i] else begin[i], None if last[i] else end[i], strides[i]
                ).indices(size)
                x = sliced(b, r, x, axis, start, stop, step)
            axis += 1
    for axis in reversed(dropped):
        shape = list(b.shape(x))
        # The index was cut out above, so that one is left.
        x = b.one("select", [x], tuple(shape[:axis] + shape[axis + 1 :]), r.scope, axis=axis, index=0)
    return x if b.shape(x) == shape_of(r) else b.one("reshape", [x], shape_of(r), r.scope)


def sliced(b: Builder, r: Record, x: int, axis: int, start: int, stop: int, step: int) -> int:
    shape = list(b.shape(x))
    if step < 1:
        raise NotSaid("a slice that runs backwards")
    if start == 0 and stop == shape[axis] and step == 1:
        return x
    shape[axis] = len(range(start, stop, step))
    return b.one("slice", [x], tuple(shape), r.scope, axis=axis, start=start, stop=stop, step=step)


def slices(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    for axis, start in enumerate(b.arg(r, 1, "begin")):
        x = sliced(b, r, x, axis, int(start), int(start) + shape_of(r)[axis], 1)
    return x


def slice_ext(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    axis = axis_of(int(b.arg(r, 1, "dim")), len(b.shape(x)))
    start, stop, step = slice(*(int(b.arg(r, i, "")) for i in (2, 3, 4))).indices(b.shape(x)[axis])
    return sliced(b, r, x, axis, start, stop, step)


def narrow(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    axis = axis_of(int(b.arg(r, 1, "dim")), len(b.shape(x)))
    start = int(b.arg(r, 2, "start")) % b.shape(x)[axis]
    return sliced(b, r, x, axis, start, start + int(b.arg(r, 3, "length")), 1)


def select(b: Builder, r: Record) -> Entry:
    x = b.need(r, 0)
    axis = axis_of(int(b.arg(r, 1, "dim")), len(b.shape(x)))
    index = int(b.arg(r, 2, "index")) % b.shape(x)[axis]
    return b.one("select", [x], shape_of(r), r.scope, axis=axis, index=index)


def pad(b: Builder, r: Record) -> Entry:
    """Padding is written for the last axis first, or as pairs for all axes; whichever explains the output's shape."""
    x, shape = b.need(r, 0), shape_of(r)
    given = b.arg(r, 1, "paddings", None) or b.arg(r, 1, "padding", ())
    before = b.shape(x)
    if given and isinstance(given[0], (tuple, list)):
        pads = [(int(p[0]), int(p[1])) for p in given]
    else:
        pairs = [(int(given[i]), int(given[i + 1])) for i in range(0, len(given) - 1, 2)]
        pads = [(0, 0)] * (len(before) - len(pairs)) + pairs[::-1]
    if tuple(s + sum(p) for s, p in zip(before, pads, strict=True)) != shape:
        raise NotSaid("paddings in another order")
    return b.one("pad", [x], shape, r.scope, pads=tuple(pads))
