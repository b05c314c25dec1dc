"""Repair of a pruned torch model from calibration data, layer after layer, before any fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core.log import progress
from slimkit.core.prune.plan import Plan
from slimkit.core.prune.refit import Moments, refit
from slimkit.replay import replaying

import torch
import torch.nn.functional as F
from torch import nn

MAX_INPUTS = 6000  # second moments of more inputs than this do not fit beside a model


def compensate(
    dense: nn.Module, pruned: nn.Module, plan: Plan, layers: Sequence[str], data: Iterable[Any], damping: float
) -> dict[str, Any]:
    """Refit every ordinary Conv and Linear layer of a pruned model to its original's outputs, in place.

    Args:
        dense: the model before the cut.
        pruned: the model after it.
        plan: the cut.
        layers: paths in the order they run.
        data: calibration batches.
        damping: see `slimkit.core.prune.refit.refit`.

    Returns:
        {"refitted": layer -> rows of calibration data it saw, "left": layers that were left alone -> why}.
    """
    report: dict[str, Any] = {"refitted": {}, "left": {}}
    for path in progress(layers, "layers"):
        old, new = bridge.get_module(dense, path), bridge.get_module(pruned, path)
        why = _unsuited(new)
        if why:
            report["left"][path] = why
            continue
        rows = plan.indices.get(f"{path}.weight", [None, None])[_out_axis(new)]
        moments = _collect(dense, pruned, old, new, path, rows, data)
        weight, bias = _matrix(new), getattr(new, "bias", None)
        start = weight.double().cpu().numpy()
        first = None if bias is None else bias.detach().double().cpu().numpy()
        fitted, shift = refit(moments, start, first, damping)
        _write(new, fitted, shift)
        report["refitted"][path] = moments.number
    return report


def _out_axis(module: nn.Module) -> int:
    return 1 if type(module).__name__ == "Conv1D" else 0


def _unsuited(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed or module.groups != 1:
            return "grouped or transposed"
        if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "not a plain Conv2d"
    if _matrix(module).shape[1] > MAX_INPUTS:
        return f"more than {MAX_INPUTS} inputs"
    return None


def _matrix(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach()
    return weight.t() if _out_axis(module) else weight.reshape(len(weight), -1)


def _write(module: nn.Module, matrix: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None) -> None:
    weight = torch.from_numpy(matrix).to(module.weight)
    with torch.no_grad():
        module.weight.copy_(weight.t() if _out_axis(module) else weight.reshape(module.weight.shape))
        if bias is not None:
            module.bias.copy_(torch.from_numpy(bias).to(module.bias))


def _rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


def _collect(
    dense: nn.Module,
    pruned: nn.Module,
    old: nn.Module,
    new: nn.Module,
    path: str,
    rows: Any,
    data: Iterable[Any],
) -> Moments:
    bias = getattr(new, "bias", None) is not None
    moments = Moments(_matrix(new).shape[1], _matrix(new).shape[0], bias)
    for batch in data:
        wanted = _seen(dense, old, path, batch)
        given = _seen(pruned, new, path, batch)
        for (_, out), (x, _) in zip(wanted, given):
            y = out.movedim(1, -1) if isinstance(old, nn.Conv2d) else out
            y = y.reshape(-1, y.shape[-1])
            y = y if rows is None else y[:, torch.from_numpy(rows).to(y.device)]
            moments.add(_rows(new, x).double().cpu().numpy(), y.double().cpu().numpy())
    return moments


def _seen(model: nn.Module, module: nn.Module, path: str, batch: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def seen(_name: str, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        # Copies: what follows, such as an activation, may work in the memory of either.
        x = args[0] if args else kwargs["input"]
        calls.append((x.detach().clone(), output.detach().clone()))

    with replaying(model) as run, bridge.hooked({path: module}, seen):
        run(batch)
    return calls
