"""`check_pruning`: the zero-mask proof of a plan on a MindSpore cell."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.batch import tensors_in
from slimkit.core.lazy import door
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.proof import PruningCheck, compare
from slimkit_ms import bridge
from slimkit_ms.prune import PruneMindSpore
from slimkit_ms.surgery.layers import aligned

import mindspore as ms
from mindspore import nn, ops

__getattr__, __dir__ = door("slimkit_ms", room="prune")


class KeptLayerNorm(nn.Cell):
    """A layer norm that takes its statistics over the kept features alone; the others come out as zeros.

    Args:
        norm: the layer norm, over the last axis.
        index: the kept features.
    """

    def __init__(self, norm: nn.LayerNorm, index: np.ndarray[Any, Any]) -> None:
        super().__init__()
        width = norm.gamma.shape[0]
        place = np.eye(width, dtype=np.float32)[index]  # (kept, width)
        self.place, self.back = ms.Tensor(place.T), ms.Tensor(place)
        self.gamma, self.beta = norm.gamma.value()[ms.Tensor(index)], norm.beta.value()[ms.Tensor(index)]
        self.epsilon = norm.epsilon

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        kept = ops.matmul(x, self.place)  # (..., kept)
        centred = kept - kept.mean(-1, keep_dims=True)
        spread = ops.sqrt(ops.square(centred).mean(-1, keep_dims=True) + self.epsilon)
        return ops.matmul(centred / spread * self.gamma + self.beta, self.back)  # (..., width)


def check_pruning(model: nn.Cell, inputs: Any, desc: dict[str, Any], *, tolerance: float = 1e-4) -> PruningCheck:
    """Prove a plan on a cell of your own: cut, it says what it said with the dropped indices set to zero.

    `nn.LayerNorm` over a cut axis takes its statistics over the kept features in both; of other norms and means over
    cut axes nothing can be done in the uncut cell, and the check fails there.

    Args:
        model: the uncut cell; it stays as it is.
        inputs: an example of what it takes, with real values.
        desc: the plan.
        tolerance: largest difference allowed, as a share of the largest output; float32 nets stay far below 1e-4.

    Returns:
        The check, with the largest difference seen.

    Raises:
        PlanError: the plan belongs to another cell.
        GraphError: the outputs differ, or the cut cell does not run.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(8, 64), nn.ReLU(), nn.Dense(64, 4))
        >>> _, desc = PruneMindSpore(net, ops.ones((1, 8))).analysis(0.5)
        >>> check_pruning(net, ops.ones((3, 8)), desc).holds
        True
    """
    bridge.check_model(model)
    check.number(tolerance, "tolerance", minimum=0)
    plan = PrunePlan(desc)
    shapes = {paths[0]: tuple(p.shape) for p, paths in bridge.parameter_paths(model)}
    names = plan.match(shapes)
    indices = {names[p]: aligned(shapes[names[p]], axes) for p, axes in plan.filled().items()}
    small, wide = copy.deepcopy(model), copy.deepcopy(model)
    PruneMindSpore(small, inputs).prune_by_desc(desc, weights_follow=True)
    statistics = _narrow(wide, indices)
    _zero(wide, indices)
    outputs = []
    for cell in (small, wide):
        with bridge.evaluating(cell), bridge.pynative():
            outputs.append([t.asnumpy() for t in tensors_in(bridge.run(cell, inputs))])
    return compare(outputs[0], outputs[1], tolerance, statistics)


def _zero(model: nn.Cell, indices: Mapping[str, Sequence[Any]]) -> None:
    """Set everything that a plan drops to zero, in place."""
    for parameter, paths in bridge.parameter_paths(model):
        if paths[0] in indices:
            value = parameter.asnumpy().copy()
            for axis, index in enumerate(indices[paths[0]]):
                if index is not None:
                    gone = np.setdiff1d(np.arange(value.shape[axis]), index)
                    value[(slice(None),) * axis + (gone,)] = 0
            parameter.set_data(ms.Tensor(value))


def _narrow(model: nn.Cell, indices: Mapping[str, Sequence[Any]]) -> list[str]:
    """Give layer norms over a cut axis statistics of what stays, in place; returns their paths."""
    found = []
    for path, cell in list(model.cells_and_names()):
        kept = indices.get(f"{path}.gamma" if path else "gamma", [None])[0]
        if isinstance(cell, nn.LayerNorm) and len(cell.gamma.shape) == 1 and kept is not None:
            bridge.set_module(model, path, KeptLayerNorm(cell, np.asarray(kept)))
            found.append(f"LayerNorm in {path}")
    return found
