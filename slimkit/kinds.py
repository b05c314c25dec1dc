"""What kind of layer a module is and how it is laid out: this wing's one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimkit.core.lazy import require

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402


@dataclass(frozen=True)
class LayerKind:
    """A family of layers whose mathematics is known.

    Args:
        word: "linear", "conv", "embedding" or "norm".
        space: axes of space that a convolution runs over.
        transposed: whether the weight of a convolution is (in, out / groups, *kernel), not (out, in / groups, *kernel).
        in_out: whether the weight of a linear layer is (in, out), not (out, in).
        batch_norm: whether a norm keeps running statistics of its batches.
    """

    word: str
    space: int = 0
    transposed: bool = False
    in_out: bool = False
    batch_norm: bool = False


_CONV1D = LayerKind("linear", in_out=True)
# Subclasses count as what they derive from.
KINDS: dict[type, LayerKind] = {
    nn.Linear: LayerKind("linear"),
    nn.Conv1d: LayerKind("conv", 1),
    nn.Conv2d: LayerKind("conv", 2),
    nn.Conv3d: LayerKind("conv", 3),
    nn.ConvTranspose1d: LayerKind("conv", 1, True),
    nn.ConvTranspose2d: LayerKind("conv", 2, True),
    nn.ConvTranspose3d: LayerKind("conv", 3, True),
    nn.Embedding: LayerKind("embedding"),
    nn.modules.batchnorm._BatchNorm: LayerKind("norm", batch_norm=True),
    nn.modules.instancenorm._InstanceNorm: LayerKind("norm"),
    nn.GroupNorm: LayerKind("norm"),
    nn.LayerNorm: LayerKind("norm"),
    nn.RMSNorm: LayerKind("norm"),
}


def _row(module: nn.Module) -> type | None:
    return next((kind for kind in type(module).__mro__ if kind in KINDS), None)


def _conv1d(module: nn.Module) -> type | None:
    """Hugging Face's Conv1D among a module's classes, or a copy of it; a wrapper that is merely called so is none.

    By name: importing transformers to look at a class would cost seconds.
    """
    found = next((kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D"), None)
    if found is None or found.__module__.startswith("transformers."):
        return found
    weight = module._parameters.get("weight")
    return found if isinstance(weight, torch.Tensor) and weight.ndim == 2 and "nf" in vars(module) else None


def kind_of(module: nn.Module) -> LayerKind | None:
    """The family a module belongs to; None for any other module.

    Example:
        >>> kind_of(nn.Linear(2, 3)).word, kind_of(nn.ReLU())
        ('linear', None)
    """
    row = _row(module)
    if row is not None:
        return KINDS[row]
    return _CONV1D if _conv1d(module) is not None else None


def is_kind(module: nn.Module, word: str, space: int | None = None) -> bool:
    """Whether a module is of that family, and if it is a convolution, over so many axes of space."""
    kind = kind_of(module)
    return kind is not None and kind.word == word and space in (None, kind.space)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, or is called so: models bring their own, such as LlamaRMSNorm."""
    return is_kind(module, "norm") or "norm" in type(module).__name__.lower()


def is_table(module: nn.Module) -> bool:
    """Whether a module looks rows up: an embedding, or torch's bags of them, of which nothing else here knows."""
    return is_kind(module, "embedding") or isinstance(module, nn.EmbeddingBag)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer: what `un_prune_list` counts."""
    return is_kind(module, "conv") or is_kind(module, "linear")


def is_ordinary_conv2d(module: nn.Module) -> bool:
    """Whether a module is a convolution over images, its weight (out, in / groups, height, width)."""
    return kind_of(module) == LayerKind("conv", 2)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution."""
    kind = kind_of(module)
    return kind is not None and kind.transposed


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises by running statistics of its batches."""
    kind = kind_of(module)
    return kind is not None and kind.batch_norm


def is_in_out(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight (in, out): Hugging Face's Conv1D."""
    return kind_of(module) == _CONV1D


def computes_as_its_kind(module: nn.Module, kind: type | None = None) -> bool:
    """Whether a module's forward is its family's own: a subclass with a forward of its own computes something else.

    Args:
        module: the module.
        kind: the class to ask of, where it is not the module's own.
    """
    row: Any = _row(module)
    if row is None:
        row = _conv1d(module)
        if row is None or not row.__module__.startswith("transformers."):
            return False
    own: Any = kind or type(module)
    return own.forward is row.forward
