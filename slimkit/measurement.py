"""What a torch model weighs: parameters, zeros, multiply-accumulates and latency, layer by layer."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from slimkit import bridge, kinds
from slimkit.core.jobs.measurement import LayerMeasurement, Measurement, fastest_ms

import torch
from torch import nn


def measure_model(
    model: nn.Module, inputs: Any, latency_budget_s: float = 0.5, dense: nn.Module | None = None
) -> Measurement:
    """Measure a model on one example input; the model is left as it was.

    Args:
        model: any module.
        inputs: what `model(*inputs)` takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        latency_budget_s: seconds to spend on timing forwards with one thread; 0 does not time them: NaN.
        dense: a model whose forwards are timed in turn with this one's.

    Returns:
        The figures of the whole model and of each layer that holds a weight of two or more axes.

    Example:
        >>> measure_model(nn.Linear(4, 3), torch.ones(2, 4), 0.01).macs
        24
    """
    layers = {n: m for n, m in model.named_modules() if _weights(m)}
    macs: dict[str, int] = {}

    def seen(name: str, args: Any, kwargs: Any, output: Any) -> None:
        # A layer called twice works twice.
        macs[name] = macs.get(name, 0) + _macs(layers[name], args, output)

    with bridge.evaluating(model):
        with bridge.hooked(layers, seen):
            bridge.run(model, inputs)
        times = _latencies_ms([model] if dense is None else [model, dense], inputs, latency_budget_s)
    zeros = {id(w): w.numel() - int(torch.count_nonzero(w)) for layer in layers.values() for w in _weights(layer)}
    rows = tuple(
        LayerMeasurement(
            name=name,
            kind=type(layer).__name__,
            shape=tuple(_weights(layer)[0].shape),
            width=_width(layer),
            parameters=sum(p.numel() for p in layer.parameters(recurse=False)),
            zeros=sum(zeros[id(w)] for w in _weights(layer)),
            macs=macs.get(name),
        )
        for name, layer in layers.items()
    )
    parameters = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return Measurement.of(rows, parameters, sum(zeros.values()), *times)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that are matrices or kernels, the weight first."""
    found = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim >= 2}
    return sorted(found.values(), key=lambda p: p is not found.get("weight"))


def _width(layer: nn.Module) -> int:
    """Output channels or features."""
    for attribute in ("out_features", "out_channels", "nf", "embedding_dim"):
        if isinstance(value := getattr(layer, attribute, None), int):
            return value
    return int(_weights(layer)[0].shape[0])


def _macs(layer: nn.Module, args: Any, output: Any) -> int:
    """Each entry of a weight is used once at every position: pixel, token or sample."""
    if kinds.is_kind(layer, "embedding") or not isinstance(output, torch.Tensor):
        return 0
    if kinds.is_transposed(layer):
        positions = args[0].numel() // layer.in_channels
    else:
        positions = output.numel() // max(_width(layer), 1)
    return positions * sum(w.numel() for w in _weights(layer))


def _latencies_ms(models: list[nn.Module], inputs: Any, budget_s: float) -> list[float]:
    threads = torch.get_num_threads()

    def forward(model: nn.Module) -> None:
        device = bridge.device_of(model)
        bridge.run(model, bridge.to_device(inputs, device))
        if device.type != "cpu":
            torch.accelerator.synchronize()

    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as held:
            for model in models[1:]:
                held.enter_context(bridge.evaluating(model))
            return fastest_ms([functools.partial(forward, model) for model in models], budget_s)
    finally:
        torch.set_num_threads(threads)
