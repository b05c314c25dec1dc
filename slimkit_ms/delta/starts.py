"""What starts of LoRA are read from, in MindSpore: gradients of weights, and the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit_ms import bridge
from slimkit_ms.replay import replaying, unchanged
from slimkit_ms.signals import padding_of, real_rows

import mindspore as ms
from mindspore import nn

__all__ = ["bridge", "given", "gradients"]


def gradients(
    model: nn.Cell, layers: dict[str, Any], batches: Sequence[Any], loss: Callable[..., Any] | None
) -> Iterator[tuple[str, Any]]:
    """Path and dL/dW (outputs, inputs), summed over the batches, of each layer; the model is as it was."""
    weights = {path: layer._params.get("weight") for path, layer in layers.items()}
    if lacking := [path for path, weight in weights.items() if weight is None]:
        raise UnsupportedError(f"init='gradient' wants the weight of {lacking[0]} as a parameter.")
    # A weight that several places share comes once; the gradient is that of all of them.
    unique = list({id(w): w for w in weights.values()}.values())
    trained = [w.requires_grad for w in unique]
    total: list[Any] = []
    with bridge.evaluating(model), bridge.pynative():
        try:
            for weight in unique:
                weight.requires_grad = True
            gradient = ms.value_and_grad(lambda batch: _loss(model, batch, loss), None, ms.ParameterTuple(unique))
            for batch in batches:
                with unchanged(model), bridge.whole_gradient():
                    found = gradient(bridge.tensors(batch))[1]
                found = [g.astype(ms.float32).asnumpy() for g in found]
                total = [t + g for t, g in zip(total, found)] if total else found
        finally:
            for weight, trains in zip(unique, trained):
                weight.requires_grad = trains
    place = {id(w): i for i, w in enumerate(unique)}
    for path, weight in weights.items():
        yield path, total[place[id(weight)]]


def _loss(model: nn.Cell, batch: Any, loss: Callable[..., Any] | None) -> ms.Tensor:
    if loss is not None:
        found = loss(model, batch)
    else:
        args, kwargs = bridge.call_of(batch)
        found = getattr(model(*args, **kwargs), "loss", None)
    if not isinstance(found, ms.Tensor):
        raise ArgumentError(
            "init='gradient' found no loss: give batches with labels to a model that computes its loss, or "
            "loss=f(model, batch)."
        )
    return found.sum()


def given(
    model: nn.Cell,
    layers: dict[str, Any],
    batches: Sequence[Any],
    seen: Callable[[str, Any], None],
    loss: Callable[..., Any] | None = None,
) -> None:
    """Call ``seen(path, rows)`` with what each layer is given, (n, inputs), rows of padding left out."""
    padding: Any = None

    def enter(path: str, inputs: Any, _output: Any) -> None:
        x = real_rows(padding, path, bridge.as_numpy(inputs[0]).astype(np.float32))
        seen(path, x.reshape(-1, x.shape[-1]))

    with replaying(model) as run, bridge.hooked(layers, enter):
        for batch in batches:
            padding = padding_of(model, batch)
            if loss is None:
                run(batch)
            else:
                with unchanged(model):
                    loss(model, bridge.tensors(batch))
