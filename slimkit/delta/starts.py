"""What starts of LoRA are read from, in torch: gradients of weights, and the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.replay import entering, replaying, unchanged
from slimkit.signals import padding_of, real_rows

import torch
from torch import nn

__all__ = ["bridge", "given", "gradients"]


def gradients(
    model: nn.Module, layers: dict[str, Any], batches: Sequence[Any], loss: Callable[..., Any] | None
) -> Iterator[tuple[str, Any]]:
    """Path and dL/dW (outputs, inputs), summed over the batches, of each layer; the model is as it was.

    All of them are in memory until they are asked for: as much as the layers' weights in their own type.
    """
    weights: dict[str, Any] = {}
    for path, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None or weight.is_meta or bridge.is_distributed(weight):
            raise UnsupportedError(f"init='gradient' wants the weight of {path} whole and in memory, as a parameter.")
        weights[path] = weight
    had = {id(p): (p, p.grad, p.requires_grad) for p in model.parameters()}
    chosen = {id(w) for w in weights.values()}
    total: dict[str, torch.Tensor] = {}
    try:
        with bridge.evaluating(model), torch.enable_grad():
            for key, (parameter, _, _) in had.items():
                parameter.grad = None
                parameter.requires_grad_(key in chosen)
            for batch in batches:
                with unchanged(model):
                    _loss(model, bridge.to_device(batch, bridge.device_of(model)), loss).backward()
        for path, weight in weights.items():
            if weight.grad is not None:
                total[path] = weight.grad.detach()
    finally:
        for parameter, grad, trains in had.values():
            parameter.grad = grad
            parameter.requires_grad_(trains)
    for path in list(total):
        gradient = total.pop(path).float().cpu().numpy()
        yield path, gradient


def _loss(model: nn.Module, batch: Any, loss: Callable[..., Any] | None) -> torch.Tensor:
    found = loss(model, batch) if loss is not None else getattr(bridge.run(model, batch), "loss", None)
    if not isinstance(found, torch.Tensor) or not found.requires_grad:
        raise ArgumentError(
            "init='gradient' found no loss: give batches with labels to a model that computes its loss, or "
            "loss=f(model, batch)."
        )
    return found.sum()


@torch.no_grad()
def given(
    model: nn.Module,
    layers: dict[str, Any],
    batches: Sequence[Any],
    seen: Callable[[str, Any], None],
    loss: Callable[..., Any] | None = None,
) -> None:
    """Call ``seen(path, rows)`` with what each layer is given, (n, inputs), rows of padding left out."""
    padding: Any = None

    def enter(path: str, args: Any, kwargs: Any) -> None:
        x = real_rows(padding, path, args[0] if args else next(iter(kwargs.values())))
        seen(path, x.reshape(-1, x.shape[-1]).float().cpu().numpy())

    with replaying(model) as run, entering(layers, enter):
        for batch in batches:
            padding = padding_of(model, batch)
            if loss is None:
                run(batch)
            else:
                with unchanged(model):
                    loss(model, bridge.to_device(batch, bridge.device_of(model)))
