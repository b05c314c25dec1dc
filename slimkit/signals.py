"""What the layers of a torch model are given, and how much the model's loss depends on what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slimkit import bridge, kinds
from slimkit.core.batch import without_labels
from slimkit.core.calibration.halves import has_encoder
from slimkit.core.padding import Padding
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal
from slimkit.core.prune.signals import SignalSums, sent_back
from slimkit.expert_calls import expert_call, holds_experts, routed_sums
from slimkit.replay import replaying

import torch
import torch.nn.functional as F
from torch import nn


def padding_of(model: nn.Module, batch: Any) -> Padding:
    """The masks of a batch."""

    def to_array(value: Any) -> Any:
        return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) and value.ndim == 2 else None

    return Padding(batch, model.forward, to_array, has_encoder(model))


def real_rows(padding: Padding, path: str, x: torch.Tensor) -> torch.Tensor:
    """A tensor that a layer is given or says, or a model answers, without its rows of padding."""
    real = padding.real(path, tuple(x.shape))
    return x if real is None else x[torch.from_numpy(real).to(x.device)]


def input_rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies with its weights: one row for each output position, (n, inputs)."""
    if kinds.is_ordinary_conv2d(module):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


def output_rows(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What a layer says: one row for each output position, (n, outputs)."""
    y = y.movedim(1, -1) if kinds.is_ordinary_conv2d(module) else y
    return y.reshape(-1, y.shape[-1])


def unsuited(module: nn.Module) -> str | None:
    """Why a layer is no plain product of its inputs with one matrix, or None."""
    if kinds.is_kind(module, "conv"):
        if module.transposed or module.groups != 1:
            return "grouped or transposed"
        if not kinds.is_ordinary_conv2d(module) or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "not a plain Conv2d"
        return None
    return None if kinds.is_kind(module, "linear") else "not a plain Conv2d or Linear"


def layer_signals(
    model: nn.Module,
    data: Iterable[Any],
    layers: Sequence[str],
    loss: Callable[..., Any] | None,
    seed: int,
    again: Callable[[], bool] = lambda: False,
) -> dict[str, LayerSignal | ExpertSignal]:
    """Send calibration data through a model and its loss back, watching some layers.

    Args:
        model: the model.
        data: batches.
        layers: paths of layers, and of modules that hold experts; other layers that are no plain product, and modules
            whose experts cannot be asked one by one, are left out.
        loss: (outputs, batch) -> scalar. Unset: of a model with logits, how far its answers move (the divergence of its
            own probabilities); of another, the square of its first output.
        seed: of the random signs that stand for the second derivative of the loss.
        again: whether a layer is being run once more for the way back, and was seen already.

    Returns:
        layer -> its signal.
    """
    modules = {p: bridge.get_module(model, p) for p in layers}
    modules = {p: m for p, m in modules.items() if unsuited(m) is None or holds_experts(m)}
    sums = SignalSums(seed)
    needed = [(p, p.requires_grad) for p in model.parameters()]
    padding: Padding

    def seen(path: str, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        module = modules[path]
        if holds_experts(module):
            call = expert_call(module, args, kwargs, output)
            if call is None:
                return output
            if not again():
                sums.routed(path, *routed_sums(call, padding.real(path, tuple(output.shape))))
        elif not again():
            x = (args[0] if args else kwargs["input"]).detach()
            rows = input_rows(module, real_rows(padding, path, x)).float()
            sums.given(path, (rows.T @ rows).double().cpu().numpy(), len(rows))

        def back(slope: torch.Tensor) -> None:
            slopes = output_rows(module, real_rows(padding, path, slope))
            sums.sloped(path, slopes.float().square().sum(0).double().cpu().numpy())

        if not output.requires_grad:
            # The first layer that is watched: from here on the graph is kept.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(back)
        return output

    try:
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        with replaying(model) as run, bridge.hooked(modules, seen):
            for batch in data:
                padding = padding_of(model, batch)
                with torch.enable_grad():
                    output = run(batch if loss is None else without_labels(batch, model.forward))
                    if loss is not None:
                        placed = bridge.to_device(batch, bridge.device_of(model))
                        wanted = loss(output, placed)
                        if wanted.requires_grad:
                            wanted.backward()
                        sums.answered(1)
                    else:
                        _back(output, padding, sums)
    finally:
        for parameter, before in needed:
            parameter.requires_grad_(before)
    return {**sums.means(), **sums.expert_means()}


def _back(output: Any, padding: Padding, sums: SignalSums) -> None:
    """Send back what makes the slopes' squares the second derivative of the loss."""
    logits = getattr(output, "logits", None)
    is_logits = isinstance(logits, torch.Tensor) and logits.shape[-1] > 1
    answer: Any = logits if is_logits else output
    while not isinstance(answer, torch.Tensor):
        answer = next(iter(answer.values() if isinstance(answer, Mapping) else answer))
    rows = real_rows(padding, "", answer).reshape(-1, answer.shape[-1])
    shares = rows.detach().float().cpu().numpy() if is_logits else None
    if rows.requires_grad:  # else no layer that is watched took part in it
        rows.backward(torch.from_numpy(sent_back(sums.random, shares, tuple(rows.shape))).to(rows))
    sums.answered(len(rows))
