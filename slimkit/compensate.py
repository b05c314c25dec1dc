"""Repair of a pruned torch model from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit import bridge, kinds
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.refit import repair
from slimkit.replay import replaying

import torch
import torch.nn.functional as F
from torch import nn

Array = np.ndarray[Any, Any]


def compensate(
    dense: nn.Module, pruned: nn.Module, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float
) -> dict[str, Any]:
    """Refit every ordinary Conv2d and Linear layer of a pruned model to its original's outputs, in place.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.refit`.

    Returns:
        What `slimkit.core.prune.refit.repair` reports.
    """
    return repair(TorchRepair(dense, pruned), layers, plan, data, damping)


class TorchRepair:
    """A torch model before and after its cut, as compensation sees it.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module) -> None:
        self._dense, self._pruned = dense, pruned

    def unsuited(self, path: str) -> str | None:
        module = bridge.get_module(self._pruned, path)
        if kinds.is_kind(module, "conv"):
            if module.transposed or module.groups != 1:
                return "grouped or transposed"
            if (
                not kinds.is_ordinary_conv2d(module)
                or module.padding_mode != "zeros"
                or isinstance(module.padding, str)
            ):
                return "not a plain Conv2d"
        return None

    def made_axis(self, path: str) -> int:
        return int(kinds.is_in_out(bridge.get_module(self._pruned, path)))

    def values(self, path: str) -> tuple[Array, Array | None]:
        module = bridge.get_module(self._pruned, path)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        weight = weight.t() if kinds.is_in_out(module) else weight.reshape(len(weight), -1)
        return _numbers(weight), None if bias is None else _numbers(bias.detach())

    def calls(self, path: str, batch: Any) -> Iterator[tuple[Array, Array]]:
        for (_, wanted), (given, _) in zip(_seen(self._dense, path, batch), _seen(self._pruned, path, batch)):
            module = bridge.get_module(self._pruned, path)
            y = wanted.movedim(1, -1) if kinds.is_ordinary_conv2d(module) else wanted
            yield _numbers(_rows(module, given)), _numbers(y.reshape(-1, y.shape[-1]))

    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        module = bridge.get_module(self._pruned, path)
        values = torch.from_numpy(weight).to(module.weight)
        with torch.no_grad():
            module.weight.copy_(values.t() if kinds.is_in_out(module) else values.reshape(module.weight.shape))
            if bias is not None:
                module.bias.copy_(torch.from_numpy(bias).to(module.bias))


def _numbers(tensor: torch.Tensor) -> Array:
    values: Array = tensor.double().cpu().numpy()
    return values


def _rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if kinds.is_ordinary_conv2d(module):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


def _seen(model: nn.Module, path: str, batch: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of one layer at each of its calls."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def seen(_name: str, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        # Copies: what follows, such as an activation, may work in the memory of either.
        x = args[0] if args else kwargs["input"]
        calls.append((x.detach().clone(), output.detach().clone()))

    with replaying(model) as run, bridge.hooked({path: bridge.get_module(model, path)}, seen):
        run(batch)
    return calls
