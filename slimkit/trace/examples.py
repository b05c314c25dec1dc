"""An example of what a torch model takes, found where none is given."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from slimkit import bridge, kinds
from slimkit.core import examples
from slimkit.core.examples import Example, FirstLayer
from slimkit.trace.passes import Trace, trace

import torch
from torch import nn


def find_example(model: nn.Module) -> tuple[Example, Trace]:
    """The first example on which a model can be traced, and its trace.

    Args:
        model: the model; it is not changed.

    Returns:
        (the example, the trace).

    Raises:
        ArgumentError: none was found; the message lists what was tried.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.to(dtype) if made.is_floating_point() else made

    attempts = [lambda inputs: trace(model, [inputs], real=False), lambda inputs: trace(model, [inputs], real=True)]
    takes = inspect.signature(model.forward).parameters
    return examples.find_example(model, takes, first_layer(model), tensor, attempts)


def first_layer(model: nn.Module) -> FirstLayer | None:
    """The first layer that a model defines and that says what it takes; None without one."""
    for path, module in model.named_modules():
        found = _first(path, module)
        if found is not None:
            return found if found.width > 0 else None  # a lazy layer knows it after its first call
    return None


def _first(path: str, module: nn.Module) -> FirstLayer | None:
    kind: Any = kinds.kind_of(module)
    if isinstance(module, nn.RNNBase):
        return FirstLayer(path, "recurrent", module.input_size)
    if kinds.is_table(module):
        return FirstLayer(path, "embedding", module.num_embeddings)
    if kinds.is_kind(module, "linear"):
        width = module.weight.shape[0] if kinds.is_in_out(module) else module.in_features
        return FirstLayer(path, "linear", int(width))
    if kinds.is_kind(module, "conv"):
        return FirstLayer(path, "conv", int(module.in_channels), kind.space)
    return None


def example(model: nn.Module, inputs: Any) -> Any:
    """The inputs given, or an example that the model says it takes."""
    return find_example(bridge.check_model(model))[0].inputs if inputs is None else inputs
