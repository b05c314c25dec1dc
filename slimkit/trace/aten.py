"""What each ATen operator is called in the neutral graph: the table of readers."""

from __future__ import annotations

from slimkit.trace import readers
from slimkit.trace.readers import Reader

_VIEWS = "view _unsafe_view reshape unsqueeze squeeze flatten unflatten _reshape_alias squeeze_ unsqueeze_"
_SAME = (
    "clone detach alias contiguous _to_copy lift_fresh lift_fresh_copy lift dropout native_dropout alias_copy "
    "fill_ zero_ detach_ _conj resolve_conj fill zero bernoulli_ _fw_primal view_of "
    "normal_ uniform_ exponential_"
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
    **dict.fromkeys(_VIEWS.split(), readers.plain("reshape")),
    **dict.fromkeys(_SAME.split(), readers.plain("identity")),
    **{name: readers.spatial(space) for space, names in _POOLS.items() for name in names.split()},
    **dict.fromkeys(_ATTENTION.split(), readers.attention),
    "t": readers.permuted(lambda a, rank: list(range(rank))[::-1]),
    "t_": readers.permuted(lambda a, rank: list(range(rank))[::-1]),
    "transpose": readers.permuted(readers.swapped),
    "transpose_": readers.permuted(readers.swapped),
    "permute": readers.permuted(lambda a, rank: [readers.counted_from_front(p, rank) for p in a[1]]),
    "expand": readers.plain("expand"),
    "repeat": readers.repeat,
    "cat": readers.cat,
    "stack": readers.stack,
    "split": readers.split,
    "split_with_sizes": readers.split,
    "unsafe_split": readers.split,
    "unsafe_split_with_sizes": readers.split,
    "chunk": readers.split,
    "slice": readers.slice_axis,
    "select": readers.select,
    "unbind": readers.unbind,
    "constant_pad_nd": readers.pad,
    "grid_sampler_2d": readers.spatial(2),
    "mm": readers.mv,
    "bmm": readers.mv,
    "mv": readers.mv,
    "dot": readers.mv,
    "matmul": readers.mv,
    "addmm": readers.addmm,
    "addmv": readers.addmm,
    "baddbmm": readers.addmm,
    "_grouped_mm": readers.grouped_mm,
    "linear": readers.linear,
    "convolution": readers.convolution,
    "_convolution": readers.convolution,
    "native_batch_norm": readers.batch_norm,
    "cudnn_batch_norm": readers.batch_norm,
    "_native_batch_norm_legit": readers.batch_norm,
    "_native_batch_norm_legit_no_training": readers.batch_norm,
    "_batch_norm_with_update": readers.batch_norm,
    "_batch_norm_no_update": readers.batch_norm,
    "native_layer_norm": readers.layer_norm,
    "_fused_rms_norm": readers.rms_norm,
    "rms_norm": readers.rms_norm,
    "native_group_norm": readers.group_norm,
    "mean": readers.reduce("mean"),
    "sum": readers.reduce("sum"),
    "nansum": readers.reduce("sum"),
    "amax": readers.reduce("amax"),
    "amin": readers.reduce("amin"),
    "max": readers.reduce("amax"),
    "min": readers.reduce("amin"),
    "var": readers.reduce("var"),
    "std": readers.reduce("std"),
    "var_mean": readers.reduce("var"),
    "std_mean": readers.reduce("std"),
    "logsumexp": readers.reduce("sum"),
    "linalg_vector_norm": readers.reduce("norm", 2),
    "norm": readers.reduce("norm", 2),
    "prod": readers.reduce("prod"),
    "any": readers.reduce("any"),
    "all": readers.reduce("all"),
    "argmax": readers.reduce("argmax"),
    "argmin": readers.reduce("argmin"),
    "_softmax": readers.along("softmax"),
    "_log_softmax": readers.along("softmax"),
    "_safe_softmax": readers.along("softmax"),
    "cumsum": readers.along("cumsum"),
    "cumprod": readers.along("cumprod"),
    "logcumsumexp": readers.along("logcumsumexp"),
    "flip": readers.along("flip"),
    "sort": readers.along("sort", 1),
    "topk": readers.along("topk", 2),
    "argsort": readers.along("argsort", 1),
    "cummax": readers.along("cummax"),
    "roll": readers.roll,
    "tril": readers.triangle,
    "triu": readers.triangle,
    "embedding": readers.embedding,
    "index_select": readers.index_select,
    "index": readers.index,
    "_unsafe_index": readers.index,
    "index_put": readers.index_put,
    "index_put_": readers.index_put,
    "_unsafe_index_put": readers.index_put,
    "gather": readers.take,
    "scatter": readers.take,
    "scatter_": readers.take,
    "scatter_add": readers.take,
    "scatter_add_": readers.take,
    "scatter_reduce": readers.take,
    "index_add": readers.index_add,
    "index_add_": readers.index_add,
    "index_copy": readers.index_add,
    "index_copy_": readers.index_add,
    "pixel_shuffle": readers.pixel_shuffle(False),
    "pixel_unshuffle": readers.pixel_shuffle(True),
    "channel_shuffle": readers.channel_shuffle,
    "native_channel_shuffle": readers.channel_shuffle,
    "im2col": readers.im2col,
    "col2im": readers.col2im,
    "glu": readers.glu,
    "_embedding_bag": readers.embedding_bag,
    "_embedding_bag_forward_only": readers.embedding_bag,
    "max_unpool2d": readers.unpool(2),
    "max_unpool3d": readers.unpool(3),
    "_pack_padded_sequence": readers.packed,
    "_pad_packed_sequence": readers.packed,
    "vdot": readers.mv,
    "linalg_vecdot": readers.vecdot,
    "aminmax": readers.reduce("amax"),
    "_aminmax": readers.reduce("amax"),
    "as_strided_": readers.as_strided,
    "_weight_norm_interface": readers.weight_norm,
    "copy_": readers.copy_into,
    "copy": readers.copy_into,
}

# Factories: all elements equal, whatever tensor they took their shape from.
_UNIFORM = (
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided empty_strided "
    "rand_like randn_like"
)
UNIFORM = frozenset(_UNIFORM.split())

# Elementwise operators that torch does not tag so.
_POINTWISE = (
    "masked_fill masked_fill_ where clamp clamp_ clamp_min clamp_max gelu silu silu_ mish mish_ hardswish "
    "hardswish_ hardsigmoid hardsigmoid_ hardtanh hardtanh_ relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ "
    "prelu _prelu_kernel softplus pow fmod remainder lerp addcmul addcdiv glu_ sigmoid_ tanh_ add_ mul_ sub_ div_ "
    "rsub nan_to_num rrelu rrelu_with_noise floor_divide log_sigmoid_forward native_dropout threshold threshold_"
)
POINTWISE = frozenset(_POINTWISE.split())
