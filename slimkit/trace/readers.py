"""How ATen operators become neutral ones: where their axes stand among their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)

import torch

# emit(op, inputs, outputs, **attrs): inputs are tensors or None, outputs are tensors.
Emit = Callable[..., None]
Reader = Callable[[Emit, Sequence[Any], dict[str, Any], Sequence[Any]], None]


def _rank(x: Any) -> int:
    return int(x.dim())


def counted_from_front(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _axes(axes: Any, rank: int) -> list[int]:
    if axes is None:
        return list(range(rank))
    listed = [axes] if isinstance(axes, int) else list(axes)
    return sorted(counted_from_front(a, rank) for a in listed) if listed else list(range(rank))


def _arg(args: Sequence[Any], kw: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kw.get(name, default)


def plain(op: str, n_inputs: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit(op, a[:n_inputs], out[:1])

    return read


def permuted(order: Callable[[Sequence[Any], int], list[int]]) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("transpose", a[:1], out, perm=order(a, _rank(a[0])))

    return read


def swapped(a: Sequence[Any], rank: int) -> list[int]:
    order = list(range(rank))
    i, j = counted_from_front(a[1], rank), counted_from_front(a[2], rank)
    order[i], order[j] = order[j], order[i]
    return order


def cat(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    # torch lets an empty 1-d tensor join any concatenation.
    parts = [t for t in a[0] if not (t.dim() == 1 and t.numel() == 0)] or list(a[0])
    emit("concat", parts, out, axis=counted_from_front(_arg(a, kw, 1, "dim", 0), _rank(out[0])))


def stack(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("stack", a[0], out, axis=counted_from_front(_arg(a, kw, 1, "dim", 0), _rank(out[0])))


def split(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = counted_from_front(_arg(a, kw, 2, "dim", 0), _rank(a[0]))
    emit("split", a[:1], out, axis=axis, sizes=[int(o.shape[axis]) for o in out])


def slice_axis(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = counted_from_front(_arg(a, kw, 1, "dim", 0), _rank(a[0]))
    size = int(a[0].shape[axis])
    start, stop, step = (_arg(a, kw, k, n, d) for k, n, d in ((2, "start", 0), (3, "end", size), (4, "step", 1)))
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    stop = size if stop is None else min(max(stop + size if stop < 0 else stop, start), size)
    if start == 0 and stop == size and step == 1:
        emit("identity", a[:1], out)
    else:
        emit("slice", a[:1], out, axis=axis, start=start, stop=stop, step=step)


def select(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = counted_from_front(a[1], _rank(a[0]))
    emit("select", a[:1], out, axis=axis, index=counted_from_front(int(a[2]), int(a[0].shape[axis])))


def unbind(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("unbind", a[:1], out, axis=counted_from_front(_arg(a, kw, 1, "dim", 0), _rank(a[0])))


def pad(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    pads = [(0, 0)] * _rank(a[0])
    for k in range(len(a[1]) // 2):
        pads[-1 - k] = (a[1][2 * k], a[1][2 * k + 1])
    emit("pad", a[:1], out, pads=pads)


def spatial(space: int, n_inputs: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("pool", a[:n_inputs], out, space=space)

    return read


def addmm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    made = torch.empty(out[0].shape, dtype=out[0].dtype, device="meta")
    emit("matmul", a[1:3], [made])
    emit("elementwise", [a[0], made], out, fn="add")


def mv(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("matmul", a[:2], out)


def grouped_mm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    x, weight = a[0], a[1]
    if x.dim() != 2 or weight.dim() != 3:
        emit("opaque", [x, weight], out, fn="_grouped_mm")
        return
    # Rows of x meet one of the stacked weights each; for the coupling it is all of them, summed.
    wide, every = x.new_empty((1, *x.shape), device="meta"), x.new_empty((len(weight), *out[0].shape), device="meta")
    emit("reshape", [x], [wide])
    emit("matmul", [wide, weight], [every])
    emit("reduce", [every], out, axes=[0], keepdim=False, fn="sum")


def linear(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("linear", [a[0], a[1], _arg(a, kw, 2, "bias", None)], out)


def convolution(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("conv", a[:3], out, transposed=bool(a[6]), groups=int(a[8]))


def batch_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("norm", a[:5] if isinstance(a[3], torch.Tensor) else a[:3], out[:1], axes=[1])


def layer_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    rank = _rank(a[0])
    emit("layer_norm", [a[0], *a[2:4]], out[:1], axes=list(range(rank - len(a[1]), rank)))


def rms_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    rank = _rank(a[0])
    axes = list(range(rank - len(a[1]), rank))
    emit("layer_norm", [a[0], _arg(a, kw, 2, "weight", None)], out[:1], axes=axes, centred=False)


def group_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("group_norm", a[:3], out[:1], groups=int(a[6]))


def reduce(fn: str, place: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        rank = _rank(a[0])
        axes = _axes(_arg(a, kw, place, "dim", None), rank)
        keep = rank > 0 and _rank(out[0]) == rank
        emit("reduce", a[:1], out, axes=axes, keepdim=keep, fn=fn)

    return read


def along(fn: str, place: int = 1, default: Any = -1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        axes = _arg(a, kw, place, "dim", default)
        emit("along", a[:1], out, axes=_axes(axes, _rank(a[0])), fn=fn)

    return read


def roll(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("along", a[:1], out, axes=_axes(_arg(a, kw, 2, "dims", None), _rank(a[0])), fn="roll")


def triangle(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("along", a[:1], out, axes=[_rank(a[0]) - 2, _rank(a[0]) - 1], fn="tril")


def embedding(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("embedding", a[:2], out)


def index_select(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("gather", [a[0], a[2]], out, axis=counted_from_front(a[1], _rank(a[0])))


def index(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    used = [k for k, i in enumerate(a[1]) if i is not None]
    if used != list(range(used[0], used[-1] + 1)):
        emit("opaque", [a[0]], out, fn="index over separated axes")
        return
    x, axis = a[0], used[0]
    if len(used) > 1:
        # Several indices at once read a flattened axis by one index.
        shape = [*x.shape[:axis], math.prod(x.shape[axis : used[-1] + 1]), *x.shape[used[-1] + 1 :]]
        flat = x.new_empty(shape, device="meta")
        emit("reshape", [x], [flat])
        x = flat
    emit("gather", [x, a[1][axis]], out, axis=axis)


def index_put(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    used = [k for k, i in enumerate(a[1]) if i is not None]
    x, values = a[0], a[2]
    # A mask stands for as many axes as it has itself.
    covered = sum(_rank(i) if i.dtype in (torch.bool, torch.uint8) else 1 for i in a[1] if i is not None)
    tail = list(x.shape[covered:])
    if used == list(range(len(used))) and tail and list(values.shape[-len(tail) :]) == tail:
        # x[i, j] = v: the axes after the indexed ones are those of v; tie them through a fully indexed front.
        front = values.new_empty([1] * covered + tail, device="meta")
        one = values.new_empty(tail, device="meta")
        lead = _rank(values) - len(tail)
        emit("reduce", [values], [one], axes=list(range(lead)), keepdim=False, fn="any" if lead else "sum")
        emit("reshape", [one], [front])
        for axis in range(covered):
            emit("scatter", [x, None, front], out, axis=axis)
        return
    if values.numel() == 1:
        for axis in range(covered):
            emit("scatter", [x, None, None], out, axis=axis)
        return
    emit("opaque", [x, values], out, fn="index_put")


def glu(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = counted_from_front(_arg(a, kw, 1, "dim", -1), _rank(a[0]))
    halves = [torch.empty(out[0].shape, dtype=out[0].dtype, device="meta") for _ in range(2)]
    emit("split", a[:1], halves, axis=axis, sizes=[int(h.shape[axis]) for h in halves])
    emit("elementwise", halves, out, fn="glu")


def col2im(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    """(B, C * kernel, L) -> (B, C, *space): every channel's positions are summed into places of its own."""
    x, kernel = a[0], math.prod(a[2])
    lead, n_channels, n_places = list(x.shape[:-2]), x.shape[-2] // kernel, x.shape[-1]
    apart = x.new_empty([*lead, n_channels, kernel, n_places], device="meta")
    emit("reshape", [x], [apart])
    summed = x.new_empty([*lead, n_channels, kernel, 1], device="meta")
    emit("pool", [apart], [summed], space=2)
    flat = x.new_empty([*lead, n_channels, kernel], device="meta")
    emit("reshape", [summed], [flat])
    once = x.new_empty([*lead, n_channels, 1, 1], device="meta")
    folded = x.new_empty([*lead, n_channels, 1], device="meta")
    emit("reduce", [flat], [folded], axes=[_rank(flat) - 1], keepdim=True, fn="sum")
    emit("reshape", [folded], [once])
    emit("expand", [once], out)


def packed(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    """Packing and unpacking of sequences: the axes in front go over into one another, the features stay."""
    x, size = a[0], a[0].shape[-1]
    flat = x.new_empty((size,), device="meta")
    one = x.new_empty([1] * (_rank(out[0]) - 1) + [size], device="meta")
    emit("reduce", [x], [flat], axes=list(range(_rank(x) - 1)), keepdim=False, fn="any")
    emit("reshape", [flat], [one])
    emit("expand", [one], out[:1])


def vecdot(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = counted_from_front(_arg(a, kw, 2, "dim", -1), _rank(a[0]))
    both = torch.empty(torch.broadcast_shapes(a[0].shape, a[1].shape), dtype=out[0].dtype, device="meta")
    emit("elementwise", a[:2], [both], fn="mul")
    emit("reduce", [both], out, axes=[axis], keepdim=False, fn="sum")


def embedding_bag(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    """Rows of a table looked up and summed, averaged or maximised: (bags, columns)."""
    rows = a[0].new_empty((a[1].shape[0], a[0].shape[1]), device="meta")
    emit("embedding", a[:2], [rows])
    one = a[0].new_empty((1, a[0].shape[1]), device="meta")
    emit("reduce", [rows], [one], axes=[0], keepdim=True, fn="sum")
    emit("expand", [one], out[:1])


def unpool(space: int) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        both = torch.empty(a[0].shape, dtype=a[0].dtype, device="meta")
        emit("elementwise", a[:2], [both], fn="unpool")  # every value has a place, so they are cut together
        emit("pool", [both], out, space=space)

    return read


def take(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    tensors = [t for t in a if isinstance(t, torch.Tensor)]
    emit("scatter", tensors, out, axis=counted_from_front(a[1], _rank(a[0])))


def index_add(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("scatter", [a[0], None, a[3]], out, axis=counted_from_front(a[1], _rank(a[0])))


def pixel_shuffle(inverse: bool) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("pixel_shuffle", a[:1], out, factor=int(a[1]), inverse=inverse)

    return read


def channel_shuffle(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("channel_shuffle", a[:1], out, groups=int(a[1]))


def im2col(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("unfold", a[:1], out, kernel=math.prod(a[1]))


def attention(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    mask = kw.get("attn_mask", a[3] if len(a) > 3 and isinstance(a[3], torch.Tensor) else None)
    emit("attention", [*a[:3], mask], out[:1])


def copy_into(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("elementwise", a[:2], out, fn="copy")


def weight_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("elementwise", a[:2], out[:1], fn="weight_norm")


def as_strided(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    same = list(a[1]) == list(a[0].shape)
    emit("identity" if same else "opaque", a[:1], out, fn="as_strided")


def repeat(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    repeats, x = list(a[1]), a[0]
    if len(repeats) > _rank(x):
        wide = x.new_empty([1] * (len(repeats) - _rank(x)) + list(x.shape), device="meta")
        emit("reshape", [x], [wide])
        x = wide
    emit("repeat", [x], out, repeats=repeats)
