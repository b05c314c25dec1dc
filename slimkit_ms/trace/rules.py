"""The table of rules: how each MindSpore primitive reads in the vocabulary of slimkit.core.prune.graph."""

from __future__ import annotations

from functools import partial

from slimkit_ms.trace import elementwise, layers, shapes
from slimkit_ms.trace.builder import Rule

_elementwise: list[tuple[Rule, str]] = [
    (
        partial(elementwise.unary, zero=True),
        "ReLU ReLU6 ReLUV2 ReluExt GeLU GeluExt FastGeLU NpuGelu SiLU Tanh HSwish Elu EluExt LeakyReLU "
        "LeakyReLUExt Abs Neg Square Sqrt Sin Sinh Erf Sign Round Floor Ceil Trunc Rint SoftShrink HShrink SeLU "
        "SeLUExt CeLU Mish MishExt Expm1 Log1p Asin AsinExt Asinh AsinhExt Atan AtanExt Tan Softsign NanToNum "
        "Swish InplaceReLU InplaceSiLU",
    ),
    (
        elementwise.unary,
        "Sigmoid HSigmoid Exp Exp2 Log Log2 Log10 Rsqrt Reciprocal Inv Cos Cosh Softplus SoftplusExt LogSigmoid "
        "Erfc ACos AcosExt Acosh Erfinv Logit LogicalNot BitwiseNot BoolNot IsNan IsInf IsFinite Threshold "
        "Hardtanh ClampScalar Digamma Lgamma NormalCdf",
    ),
    (
        elementwise.elementwise,
        "Add AddExt AddScalar AddV2 AddN Sub SubExt SubScalar Mul Muls Div Divs RealDiv DivNoNan DivMod DivMods "
        "FloorDiv FloorDivScalar FloorMod Mod TruncateDiv TruncateMod PowScalarTensor Maximum "
        "Minimum Equal EqualExt EqScalar NotEqual NeScalar Greater GreaterEqual GreaterEqualScalar GreaterScalar "
        "Less LessEqual LessScalar LessEqualScalar LogicalAnd LogicalOr LogicalXor BitwiseAnd BitwiseOr "
        "BitwiseXor BitwiseAndTensor BitwiseOrTensor Select SelectV2 MaskedFill MaskedFillScalar Lerp LerpScalar "
        "ClampTensor Addcmul Addcdiv AddcmulExt AddcdivExt SquaredDifference Atan2 Atan2Ext Xlogy Xdivy MulNoNan "
        "LogAddExp ApproximateEqual Hypot RemainderTensorScalar RemainderTensorTensor FmodScalar FmodTensor "
        "ClipByValue",
    ),
    (
        # `x += y`: the result goes on under a new name, so that it reads like the plain operator.
        elementwise.elementwise,
        "InplaceAdd InplaceAddExt InplaceAddsExt InplaceSub InplaceSubExt InplaceSubScalar InplaceMul InplaceMuls "
        "InplaceDiv InplaceDivs InplaceMaskedFillScalar InplaceMaskedFillTensor",
    ),
    (elementwise.bias_add, "BiasAdd"),
    (elementwise.prelu, "PReLU"),
    (elementwise.power, "Pow PowTensorScalar"),
]
_values: list[tuple[Rule, str]] = [
    (elementwise.same, "Identity Load Depend StopGradient Copy Contiguous Clone Detach TensorMove Return"),
    (elementwise.cast, "Cast ToDtype ToDevice ToOther"),
    (
        elementwise.filled,
        "Zeros Ones ZerosLike OnesLike ZerosLikeExt OnesLikeExt FullLike FillScalar Fill FillV2 NewZeros NewOnes "
        "NewFull Empty EmptyLike",
    ),
    (elementwise.made, "Range Arange LinSpace LinSpaceExt Eye"),
    (elementwise.make_tuple, "MakeTuple MakeList"),
    (elementwise.get_item, "TupleGetItem ListGetItem RealTupleGetItem"),
]
_shapes: list[tuple[Rule, str]] = [
    (shapes.reshape, "Reshape View Flatten FlattenExt Squeeze ExpandDims ExpandDimsView ViewAs ReshapeExt"),
    (shapes.expand, "BroadcastTo BroadcastToView ExpandAs"),
    (shapes.transpose, "Transpose TransposeView"),
    (shapes.swap, "TransposeExtView TExt"),
    (shapes.tile, "Tile Repeat"),
    (shapes.repeat_interleave, "RepeatInterleaveInt RepeatInterleaveTensor"),
    (shapes.concat, "Concat"),
    (partial(shapes.concat, stack=True), "Stack StackExt"),
    (partial(shapes.split, axis_place=1, axis_name="axis"), "Split"),
    (partial(shapes.split, axis_place=9, axis_name="split_dim"), "SplitV"),
    (
        partial(shapes.split, axis_place=2, axis_name="dim"),
        "SplitTensor SplitTensorView SplitWithSize SplitWithSizeView Chunk ChunkView",
    ),
    (shapes.unstack, "Unstack UnstackExtView"),
    (shapes.strided_slice, "StridedSlice"),
    (shapes.slices, "Slice"),
    (shapes.slice_ext, "SliceExt SliceExtView"),
    (shapes.narrow, "Narrow NarrowView"),
    (shapes.select, "SelectExtView"),
    (
        shapes.pad,
        "Pad PadV3 MirrorPad ConstantPadND ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D "
        "ReplicationPad2D ReplicationPad3D",
    ),
]
_layers: list[tuple[Rule, str]] = [
    (layers.matmul, "MatMul BatchMatMul"),
    (layers.matmul_ext, "MatMulExt BatchMatMulExt Mm"),
    (layers.dense, "Dense"),
    (layers.conv, "Conv2D Conv3D"),
    (partial(layers.conv, transposed=True), "Conv2DTranspose Conv3DTranspose Conv2DBackpropInput Conv3DBackpropInput"),
    (partial(layers.conv_ext, place=6), "Conv1DExt Conv2DExt Conv3DExt Conv1DPadding Conv2DPadding Conv3DPadding"),
    (partial(layers.conv_ext, place=8, transposed_place=6), "Convolution ConvolutionStr"),
    (partial(layers.conv_ext, place=6, transposed=True), "ConvTranspose2D"),
    (layers.batch_norm, "BatchNorm BatchNormExt InstanceNorm"),
    (layers.layer_norm, "LayerNorm"),
    (layers.layer_norm_ext, "LayerNormExt"),
    (layers.rms_norm, "RmsNorm"),
    (layers.group_norm, "GroupNorm"),
    (
        layers.pool,
        "MaxPool AvgPool AvgPool2D MaxPoolWithArgmax MaxPoolWithArgmaxV2 MaxPoolWithIndices MaxPoolWithMask "
        "FuncMaxPool2D AdaptiveAvgPool2D AdaptiveAvgPool2DExt AdaptiveMaxPool2D ResizeBilinearV2 ResizeBilinear "
        "ResizeNearestNeighbor ResizeNearestNeighborV2 ResizeBicubic UpsampleBilinear2D UpsampleNearest2D "
        "UpsampleBicubic2D",
    ),
    (
        partial(layers.pool, space=1),
        "AvgPool1D AdaptiveAvgPool1D AdaptiveMaxPool1D UpsampleNearest1D UpsampleLinear1D ResizeLinear1D",
    ),
    (
        partial(layers.pool, space=3),
        "MaxPool3D AvgPool3D AvgPool3DExt AdaptiveAvgPool3D AdaptiveAvgPool3DExt AdaptiveMaxPool3D "
        "UpsampleNearest3D UpsampleTrilinear3D MaxPool3DWithArgmax",
    ),
    (partial(layers.reduce, fn="mean"), "ReduceMean MeanExt"),
    (partial(layers.reduce, fn="sum"), "ReduceSum SumExt LogSumExp"),
    (partial(layers.reduce, fn="amax"), "ReduceMax MaxDim ArgMaxWithValue"),
    (partial(layers.reduce, fn="amin"), "ReduceMin MinDim ArgMinWithValue"),
    (partial(layers.reduce, fn="prod"), "ReduceProd ProdExt"),
    (partial(layers.reduce, fn="all"), "ReduceAll"),
    (partial(layers.reduce, fn="any"), "ReduceAny"),
    (partial(layers.reduce, fn="amax", keep_place=9), "Argmax"),
    (partial(layers.reduce, fn="var", keep_place=3), "Var Std"),
    (partial(layers.reduce, fn="norm", axis_place=2, keep_place=3), "Norm LinalgVectorNorm"),
    (layers.along, "Softmax LogSoftmax LogSoftmaxExt CumSum CumsumExt CumProd ReverseV2"),
    (partial(layers.along, place=9), "Sort"),
    (partial(layers.along, name="dim"), "SortExt"),
    (partial(layers.along, place=9, default=None), "L2Normalize"),
    (partial(layers.along, place=2), "Roll"),
    (layers.gather, "Gather"),
    (layers.embedding, "Embedding"),
    (layers.flash_attention, "FlashAttentionScore"),
    (layers.pixel_shuffle, "PixelShuffle"),
    (layers.depth_to_space, "DepthToSpace"),
    (partial(layers.depth_to_space, inverse=True), "SpaceToDepth"),
]

RULES: dict[str, Rule] = {
    name: rule for table in (_elementwise, _values, _shapes, _layers) for rule, names in table for name in names.split()
}
