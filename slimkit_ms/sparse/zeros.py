"""Keeping zeros at zero while a MindSpore cell goes on training, in PyNative and in compiled graphs alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.sparse.masks import demand_masks
from slimkit_ms import bridge
from slimkit_ms.sparse.host import kind_of

import mindspore as ms
from mindspore import nn


class Masked(nn.Cell):
    """An operator whose weight is masked on the way in, so that dropped entries neither act nor get gradients."""

    def __init__(self, operator: Any, mask: ms.Tensor) -> None:
        super().__init__()
        self.operator = operator
        self.mask = mask

    def construct(self, x: ms.Tensor, weight: ms.Tensor) -> ms.Tensor:
        """Run the operator on the masked weight."""
        return self.operator(x, weight * self.mask)


class FrozenZeros:
    """A handle on zeros that stay; as a context manager it lets them go at its end.

    Hooks have no effect in compiled graphs, so the mask is part of each layer's forward: a zero gets no gradient, and
    an optimizer leaves it where it is.

    Attributes:
        masks: layer name -> boolean array, True where the entry may change.
    """

    def __init__(self, model: nn.Cell, layers: Mapping[str, nn.Cell], masks: Mapping[str, Any]) -> None:
        self.masks = dict(masks)
        self._model = model
        self._held = []
        for name, mask in masks.items():
            cell = layers[name]
            slot = "matmul" if kind_of(cell) == "linear" else "conv2d"
            operator = getattr(cell, slot)
            delattr(cell, slot)
            setattr(cell, slot, Masked(operator, ms.Tensor(mask).astype(cell.weight.dtype)))
            self._held.append((cell, slot, operator))
        self.apply()
        bridge.forget_graphs(model)

    def apply(self) -> None:
        """Set the entries to zero again, in place: for weights changed by hand, such as a merged delta."""
        for (cell, _, _), mask in zip(self._held, self.masks.values()):
            cell.weight.set_data(cell.weight.value() * ms.Tensor(mask).astype(cell.weight.dtype))

    def remove(self) -> None:
        """Let the zeros go: from here on they train like any other entry."""
        self.apply()
        for cell, slot, operator in self._held:
            delattr(cell, slot)
            setattr(cell, slot, operator)
        self._held.clear()
        bridge.forget_graphs(self._model)

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def freeze_zeros(
    model: nn.Cell,
    masks: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] | None = None,
) -> FrozenZeros:
    """Keep the zeros of a model's layers at zero through further training with any optimizer, in place.

    Args:
        model: a sparse model.
        masks: layer name -> boolean array, True where the weight may change, as `Compressor.masks` gives it; None
            takes every entry that is exactly zero now.
        targets: globs (or "re:...") of layers; None takes every Dense and Conv2d that has zeros.

    Returns:
        A handle with `remove()` and `apply()`, usable as a context manager.

    Raises:
        PatternError: a target matches no layer.
        ArgumentError: no layer has a zero, or a mask's name or shape does not fit.

    Example:
        >>> layer = nn.Dense(2, 1)
        >>> _ = layer.weight.set_data(ms.Tensor([[0.0, 1.0]]))
        >>> freeze_zeros(nn.SequentialCell(layer)).masks["0"].tolist()
        [[False, True]]
    """
    bridge.check_model(model)
    layers = {name: cell for name, cell in model.cells_and_names() if kind_of(cell) is not None}
    shapes = {name: tuple(cell.weight.shape) for name, cell in layers.items()}
    names = demand_masks(shapes, masks, targets)
    if masks is None:
        found = {n: bridge.as_numpy(layers[n].weight.astype(ms.float32)) != 0 for n in names}
        found = {n: m for n, m in found.items() if not m.all()}
        demand_masks(shapes, found, None)
    else:
        found = {n: np.asarray(masks[n], dtype=bool) for n in names}
    return FrozenZeros(model, layers, found)
