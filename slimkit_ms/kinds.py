"""What kind of layer a cell is and how it is laid out: this wing's one answer, for `nn` and `mint` alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.core.lazy import require

require("mindspore")

import mindspore as ms  # noqa: E402
from mindspore import mint, nn  # noqa: E402

# Running statistics of a norm: parameters in MindSpore, state rather than weights everywhere else.
STATISTICS = ("moving_mean", "moving_variance", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LayerKind:
    """A family of layers whose mathematics is known.

    Args:
        word: "linear", "conv", "embedding", "norm" or "recurrent".
        space: axes of space that a convolution runs over.
        transposed: whether the weight of a convolution is (in, out / groups, *kernel), not (out, in / groups, *kernel).
        weight: what the cell calls its weight.
        bias: what it calls its bias.
        operator: what it calls the operator that reads the weight as its second argument; "" where there is none.
        batch_norm: whether a norm keeps running statistics of its batches.
    """

    word: str
    space: int = 0
    transposed: bool = False
    weight: str = "weight"
    bias: str = "bias"
    operator: str = ""
    batch_norm: bool = False


_NORM = LayerKind("norm", weight="gamma", bias="beta")
_BATCH_NORM = LayerKind("norm", weight="gamma", bias="beta", batch_norm=True)
_MINT_BATCH_NORM = LayerKind("norm", batch_norm=True)

# Subclasses count as what they derive from, unless they are rows of their own.
KINDS: dict[type, LayerKind] = {
    nn.Dense: LayerKind("linear", operator="matmul"),
    mint.nn.Linear: LayerKind("linear", operator="dense"),
    nn.Conv1d: LayerKind("conv", 1),
    nn.Conv2d: LayerKind("conv", 2, operator="conv2d"),
    nn.Conv3d: LayerKind("conv", 3),
    nn.Conv1dTranspose: LayerKind("conv", 1, True),
    nn.Conv2dTranspose: LayerKind("conv", 2, True),
    nn.Conv3dTranspose: LayerKind("conv", 3, True),
    mint.nn.Conv1d: LayerKind("conv", 1),
    mint.nn.Conv2d: LayerKind("conv", 2, operator="conv2d"),
    mint.nn.Conv3d: LayerKind("conv", 3),
    mint.nn.ConvTranspose2d: LayerKind("conv", 2, True),
    nn.Embedding: LayerKind("embedding", weight="embedding_table"),
    nn.EmbeddingLookup: LayerKind("embedding", weight="embedding_table"),
    mint.nn.Embedding: LayerKind("embedding"),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    mint.nn.BatchNorm1d: _MINT_BATCH_NORM,
    mint.nn.BatchNorm2d: _MINT_BATCH_NORM,
    mint.nn.BatchNorm3d: _MINT_BATCH_NORM,
    mint.nn.SyncBatchNorm: _MINT_BATCH_NORM,
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.InstanceNorm1d: _NORM,
    nn.InstanceNorm2d: _NORM,
    nn.InstanceNorm3d: _NORM,
    mint.nn.LayerNorm: LayerKind("norm"),
    mint.nn.GroupNorm: LayerKind("norm"),
    nn.RNN: LayerKind("recurrent"),
    nn.GRU: LayerKind("recurrent"),
    nn.LSTM: LayerKind("recurrent"),
}


def _row(cell: nn.Cell | None) -> type | None:
    return next((kind for kind in type(cell).__mro__ if kind in KINDS), None)


def kind_of(cell: nn.Cell | None) -> LayerKind | None:
    """The family a cell belongs to; None for any other cell.

    Example:
        >>> kind_of(mint.nn.Linear(2, 3)) == kind_of(nn.Dense(2, 3)), kind_of(nn.ReLU())
        (True, None)
    """
    row = _row(cell)
    return None if row is None else KINDS[row]


def is_kind(cell: nn.Cell | None, word: str, space: int | None = None) -> bool:
    """Whether a cell is of that family, and if it is a convolution, over so many axes of space."""
    kind = kind_of(cell)
    return kind is not None and kind.word == word and space in (None, kind.space)


def is_norm(cell: nn.Cell) -> bool:
    """Whether a cell is a norm, or is called so: models bring their own, such as LlamaRMSNorm."""
    return is_kind(cell, "norm") or "norm" in type(cell).__name__.lower()


def is_layer(cell: nn.Cell | None) -> bool:
    """Whether a cell is a convolution or a dense layer."""
    return is_kind(cell, "conv") or is_kind(cell, "linear")


def is_ordinary_conv2d(cell: nn.Cell | None) -> bool:
    """Whether a cell is a convolution over images, its weight (out, in / groups, height, width)."""
    kind = kind_of(cell)
    return kind is not None and (kind.word, kind.space, kind.transposed) == ("conv", 2, False)


def is_transposed(cell: nn.Cell | None) -> bool:
    """Whether a cell is a transposed convolution."""
    kind = kind_of(cell)
    return kind is not None and kind.transposed


def makes_width(cell: nn.Cell | None) -> bool:
    """Whether a cell is a layer or a table, so that `width_of` speaks of it."""
    return is_layer(cell) or is_kind(cell, "embedding")


def is_batch_norm(cell: nn.Cell | None) -> bool:
    """Whether a cell normalises by running statistics of its batches."""
    kind = kind_of(cell)
    return kind is not None and kind.batch_norm


def computes_as_its_kind(cell: nn.Cell) -> bool:
    """Whether a cell's forward is its family's own: a subclass with a construct of its own computes something else."""
    row: Any = _row(cell)
    return row is not None and type(cell).construct is row.construct


def weight_of(cell: nn.Cell) -> ms.Parameter:
    """The weight of a cell of a known family."""
    kind = kind_of(cell)
    assert kind is not None
    return getattr(cell, kind.weight)


def bias_of(cell: nn.Cell) -> ms.Parameter | None:
    """The bias of a cell of a known family; None without one."""
    kind = kind_of(cell)
    assert kind is not None
    return cell._params.get(kind.bias)


def activation_of(cell: nn.Cell) -> Any:
    """The activation that a dense layer carries itself; None for most, and for `mint` always."""
    return cell.activation if isinstance(cell, nn.Dense) and cell.activation_flag else None


def width_of(cell: nn.Cell) -> int:
    """Output channels or features of a dense layer, convolution or table."""
    kind, weight = kind_of(cell), weight_of(cell)
    assert kind is not None
    if kind.transposed:
        return int(weight.shape[1]) * groups_of(cell)
    return int(weight.shape[1] if kind.word == "embedding" else weight.shape[0])


# --- how a convolution walks over its input --------------------------------------------------------------------------


def groups_of(cell: nn.Cell) -> int:
    """Groups of a convolution."""
    return int(cell.groups if "groups" in vars(cell) else cell.group)


def steps_of(cell: nn.Cell, name: str) -> tuple[int, int]:
    """Vertical and horizontal "stride" or "dilation" of a convolution over images, kept as 1, 2 or 4 numbers."""
    value = vars(cell)[name]
    return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def padding_mode_of(cell: nn.Cell) -> str:
    """What a convolution pads with: "zeros", or another word of `mint`'s."""
    return str(vars(cell).get("padding_mode", "zeros"))


def pads_of(cell: nn.Cell, size: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of both axes that a convolution over images of that size pads."""
    if "pad_mode" not in vars(cell):  # mint's: a number, one for each axis, or a word
        if cell.padding not in ("same", "valid"):
            pads = (cell.padding,) * 2 if isinstance(cell.padding, int) else tuple(cell.padding)
            return [(int(p), int(p)) for p in pads]
        mode = cell.padding
    else:
        mode = cell.pad_mode
        if mode == "pad":
            given = (cell.padding,) * 4 if isinstance(cell.padding, int) else cell.padding
            return [(given[0], given[1]), (given[2], given[3])]
    if mode == "valid":
        return [(0, 0), (0, 0)]
    spans = [(k - 1) * d + 1 for k, d in zip(cell.kernel_size, steps_of(cell, "dilation"))]
    totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, span, s in zip(size, spans, steps_of(cell, "stride"))]
    return [(n // 2, n - n // 2) for n in totals]
