"""What each ATen operator is called in the neutral graph, and where its axes stand among its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)

import torch

aten = torch.ops.aten

# emit(op, inputs, outputs, **attrs): inputs are tensors or None, outputs are tensors.
Emit = Callable[..., None]
Reader = Callable[[Emit, Sequence[Any], dict[str, Any], Sequence[Any]], None]


def _rank(x: Any) -> int:
    return int(x.dim())


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _axes(axes: Any, rank: int) -> list[int]:
    if axes is None:
        return list(range(rank))
    listed = [axes] if isinstance(axes, int) else list(axes)
    return sorted(_axis(a, rank) for a in listed) if listed else list(range(rank))


def _arg(args: Sequence[Any], kw: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kw.get(name, default)


def _plain(op: str, n_inputs: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit(op, a[:n_inputs], out[:1])

    return read


def _permuted(order: Callable[[Sequence[Any], int], list[int]]) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("transpose", a[:1], out, perm=order(a, _rank(a[0])))

    return read


def _swapped(a: Sequence[Any], rank: int) -> list[int]:
    order = list(range(rank))
    i, j = _axis(a[1], rank), _axis(a[2], rank)
    order[i], order[j] = order[j], order[i]
    return order


def _cat(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    # torch lets an empty 1-d tensor join any concatenation.
    parts = [t for t in a[0] if not (t.dim() == 1 and t.numel() == 0)] or list(a[0])
    emit("concat", parts, out, axis=_axis(_arg(a, kw, 1, "dim", 0), _rank(out[0])))


def _stack(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("stack", a[0], out, axis=_axis(_arg(a, kw, 1, "dim", 0), _rank(out[0])))


def _split(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = _axis(_arg(a, kw, 2, "dim", 0), _rank(a[0]))
    emit("split", a[:1], out, axis=axis, sizes=[int(o.shape[axis]) for o in out])


def _slice(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = _axis(_arg(a, kw, 1, "dim", 0), _rank(a[0]))
    size = int(a[0].shape[axis])
    start, stop, step = (_arg(a, kw, k, n, d) for k, n, d in ((2, "start", 0), (3, "end", size), (4, "step", 1)))
    start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
    stop = size if stop is None else min(max(stop + size if stop < 0 else stop, start), size)
    if start == 0 and stop == size and step == 1:
        emit("identity", a[:1], out)
    else:
        emit("slice", a[:1], out, axis=axis, start=start, stop=stop, step=step)


def _select(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    axis = _axis(a[1], _rank(a[0]))
    emit("select", a[:1], out, axis=axis, index=_axis(int(a[2]), int(a[0].shape[axis])))


def _unbind(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("unbind", a[:1], out, axis=_axis(_arg(a, kw, 1, "dim", 0), _rank(a[0])))


def _pad(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    pads = [(0, 0)] * _rank(a[0])
    for k in range(len(a[1]) // 2):
        pads[-1 - k] = (a[1][2 * k], a[1][2 * k + 1])
    emit("pad", a[:1], out, pads=pads)


def _spatial(space: int, n_inputs: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("pool", a[:n_inputs], out, space=space)

    return read


def _addmm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    made = torch.empty(out[0].shape, dtype=out[0].dtype, device="meta")
    emit("matmul", a[1:3], [made])
    emit("elementwise", [a[0], made], out, fn="add")


def _mv(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("matmul", a[:2], out)


def _grouped_mm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    x, weight = a[0], a[1]
    if x.dim() != 2 or weight.dim() != 3:
        emit("opaque", [x, weight], out, fn="_grouped_mm")
        return
    # Rows of x meet one of the stacked weights each; for the coupling it is all of them, summed.
    wide, every = x.new_empty((1, *x.shape), device="meta"), x.new_empty((len(weight), *out[0].shape), device="meta")
    emit("reshape", [x], [wide])
    emit("matmul", [wide, weight], [every])
    emit("reduce", [every], out, axes=[0], keepdim=False, fn="sum")


def _linear(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("linear", [a[0], a[1], _arg(a, kw, 2, "bias", None)], out)


def _convolution(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("conv", a[:3], out, transposed=bool(a[6]), groups=int(a[8]))


def _batch_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("norm", a[:5] if isinstance(a[3], torch.Tensor) else a[:3], out[:1], axes=[1])


def _layer_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    rank = _rank(a[0])
    emit("layer_norm", [a[0], *a[2:4]], out[:1], axes=list(range(rank - len(a[1]), rank)))


def _rms_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    rank = _rank(a[0])
    emit("layer_norm", [a[0], _arg(a, kw, 2, "weight", None)], out[:1], axes=list(range(rank - len(a[1]), rank)))


def _group_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("group_norm", a[:3], out[:1], groups=int(a[6]))


def _reduce(fn: str, place: int = 1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        rank = _rank(a[0])
        axes = _axes(_arg(a, kw, place, "dim", None), rank)
        keep = rank > 0 and _rank(out[0]) == rank
        emit("reduce", a[:1], out, axes=axes, keepdim=keep, fn=fn)

    return read


def _along(fn: str, place: int = 1, default: Any = -1) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        axes = _arg(a, kw, place, "dim", default)
        emit("along", a[:1], out, axes=_axes(axes, _rank(a[0])), fn=fn)

    return read


def _roll(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("along", a[:1], out, axes=_axes(_arg(a, kw, 2, "dims", None), _rank(a[0])), fn="roll")


def _triangle(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("along", a[:1], out, axes=[_rank(a[0]) - 2, _rank(a[0]) - 1], fn="tril")


def _embedding(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("embedding", a[:2], out)


def _index_select(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("gather", [a[0], a[2]], out, axis=_axis(a[1], _rank(a[0])))


def _index(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
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


def _index_put(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    used = [k for k, i in enumerate(a[1]) if i is not None]
    x, values = a[0], a[2]
    rest = _rank(x) - len(used)
    if used and used[-1] == len(used) - 1 and rest:
        # x[i, j] = v: the axes after the indexed ones are those of v; tie them through a fully indexed front.
        front = values.new_empty([1] * len(used) + list(x.shape[len(used) :]), device="meta")
        if list(values.shape[-rest:]) == list(x.shape[len(used) :]):
            one = values.new_empty(list(values.shape[-rest:]), device="meta")
            lead = _rank(values) - rest
            emit("reduce", [values], [one], axes=list(range(lead)), keepdim=False, fn="any" if lead else "sum")
            emit("reshape", [one], [front])
            for axis in range(len(used)):
                emit("scatter", [x, None, front], out, axis=axis)
            return
    emit("opaque", [x, values], out, fn="index_put")


def _take(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    tensors = [t for t in a if isinstance(t, torch.Tensor)]
    emit("scatter", tensors, out, axis=_axis(a[1], _rank(a[0])))


def _index_add(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("scatter", [a[0], None, a[3]], out, axis=_axis(a[1], _rank(a[0])))


def _pixel_shuffle(inverse: bool) -> Reader:
    def read(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
        emit("pixel_shuffle", a[:1], out, factor=int(a[1]), inverse=inverse)

    return read


def _channel_shuffle(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("channel_shuffle", a[:1], out, groups=int(a[1]))


def _im2col(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("unfold", a[:1], out, kernel=math.prod(a[1]))


def _attention(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    mask = kw.get("attn_mask", a[3] if len(a) > 3 and isinstance(a[3], torch.Tensor) else None)
    emit("attention", [*a[:3], mask], out[:1])


def _copy(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("elementwise", a[:2], out, fn="copy")


def _weight_norm(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    emit("elementwise", a[:2], out[:1], fn="weight_norm")


def _as_strided(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    same = list(a[1]) == list(a[0].shape)
    emit("identity" if same else "opaque", a[:1], out, fn="as_strided")


def _repeat(emit: Emit, a: Sequence[Any], kw: dict[str, Any], out: Sequence[Any]) -> None:
    repeats, x = list(a[1]), a[0]
    if len(repeats) > _rank(x):
        wide = x.new_empty([1] * (len(repeats) - _rank(x)) + list(x.shape), device="meta")
        emit("reshape", [x], [wide])
        x = wide
    emit("repeat", [x], out, repeats=repeats)


_VIEWS = "view _unsafe_view reshape unsqueeze squeeze flatten unflatten _reshape_alias squeeze_ unsqueeze_"
_SAME = (
    "clone detach alias contiguous _to_copy lift_fresh lift_fresh_copy lift dropout native_dropout alias_copy "
    "fill_ zero_ detach_ _conj resolve_conj fill zero bernoulli_ _fw_primal view_of"
)
_POOLS = {
    1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "_upsample_nearest_exact1d reflection_pad1d replication_pad1d",
    2: "avg_pool2d max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "_upsample_nearest_exact2d reflection_pad2d replication_pad2d fractional_max_pool2d mkldnn_max_pool2d",
    3: "avg_pool3d max_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d",
}
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable "
    "_scaled_dot_product_cudnn_attention"
)

READERS: dict[str, Reader] = {
    **dict.fromkeys(_VIEWS.split(), _plain("reshape")),
    **dict.fromkeys(_SAME.split(), _plain("identity")),
    **{name: _spatial(space) for space, names in _POOLS.items() for name in names.split()},
    **dict.fromkeys(_ATTENTION.split(), _attention),
    "t": _permuted(lambda a, rank: list(range(rank))[::-1]),
    "t_": _permuted(lambda a, rank: list(range(rank))[::-1]),
    "transpose": _permuted(_swapped),
    "transpose_": _permuted(_swapped),
    "permute": _permuted(lambda a, rank: [_axis(p, rank) for p in a[1]]),
    "expand": _plain("expand"),
    "repeat": _repeat,
    "cat": _cat,
    "stack": _stack,
    "split": _split,
    "split_with_sizes": _split,
    "unsafe_split": _split,
    "unsafe_split_with_sizes": _split,
    "chunk": _split,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "constant_pad_nd": _pad,
    "grid_sampler_2d": _spatial(2),
    "mm": _mv,
    "bmm": _mv,
    "mv": _mv,
    "dot": _mv,
    "matmul": _mv,
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "_grouped_mm": _grouped_mm,
    "linear": _linear,
    "convolution": _convolution,
    "_convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "_batch_norm_no_update": _batch_norm,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "nansum": _reduce("sum"),
    "amax": _reduce("amax"),
    "amin": _reduce("amin"),
    "max": _reduce("amax"),
    "min": _reduce("amin"),
    "var": _reduce("var"),
    "std": _reduce("std"),
    "var_mean": _reduce("var"),
    "std_mean": _reduce("std"),
    "logsumexp": _reduce("sum"),
    "linalg_vector_norm": _reduce("norm", 2),
    "norm": _reduce("norm", 2),
    "prod": _reduce("prod"),
    "any": _reduce("any"),
    "all": _reduce("all"),
    "argmax": _reduce("argmax"),
    "argmin": _reduce("argmin"),
    "_softmax": _along("softmax"),
    "_log_softmax": _along("softmax"),
    "_safe_softmax": _along("softmax"),
    "cumsum": _along("cumsum"),
    "cumprod": _along("cumprod"),
    "logcumsumexp": _along("logcumsumexp"),
    "flip": _along("flip"),
    "sort": _along("sort", 1),
    "topk": _along("topk", 2),
    "argsort": _along("argsort", 1),
    "cummax": _along("cummax"),
    "roll": _roll,
    "tril": _triangle,
    "triu": _triangle,
    "embedding": _embedding,
    "index_select": _index_select,
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_unsafe_index_put": _index_put,
    "gather": _take,
    "scatter": _take,
    "scatter_": _take,
    "scatter_add": _take,
    "scatter_add_": _take,
    "scatter_reduce": _take,
    "index_add": _index_add,
    "index_add_": _index_add,
    "index_copy": _index_add,
    "index_copy_": _index_add,
    "pixel_shuffle": _pixel_shuffle(False),
    "pixel_unshuffle": _pixel_shuffle(True),
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "im2col": _im2col,
    "as_strided_": _as_strided,
    "_weight_norm_interface": _weight_norm,
    "copy_": _copy,
    "copy": _copy,
}

# Factories: all elements equal, whatever tensor they took their shape from.
UNIFORM = frozenset(
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_empty_strided",
        "empty_strided",
    ]
)

# Elementwise operators that torch does not tag so.
POINTWISE = frozenset(
    [
        "masked_fill",
        "masked_fill_",
        "where",
        "clamp",
        "clamp_",
        "clamp_min",
        "clamp_max",
        "gelu",
        "silu",
        "silu_",
        "mish",
        "mish_",
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "hardsigmoid_",
        "hardtanh",
        "hardtanh_",
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "prelu",
        "_prelu_kernel",
        "softplus",
        "pow",
        "fmod",
        "remainder",
        "lerp",
        "addcmul",
        "addcdiv",
        "glu_",
        "sigmoid_",
        "tanh_",
        "add_",
        "mul_",
        "sub_",
        "div_",
        "rsub",
        "nan_to_num",
        "rrelu",
        "rrelu_with_noise",
        "floor_divide",
        "log_sigmoid_forward",
        "native_dropout",
        "threshold",
        "threshold_",
    ]
)
