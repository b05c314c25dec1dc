"""How a model is run for its trace: in eval and, where its code asks for it, in training mode; chance and counters
come back."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from slimkit import bridge

import torch
from torch import nn

_SEED = 0


def reads_training(model: nn.Module) -> bool:
    """Whether a model's own code (not torch's layers) looks at `training`.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x if self.training else 2 * x
        >>> reads_training(Net()), reads_training(nn.Dropout())
        (True, False)
    """
    kinds: set[Any] = {type(m) for m in model.modules()}
    return any(_class_reads(kind) for kind in kinds)


def _own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins")


@functools.cache
def _class_reads(kind: Any) -> bool:
    found: set[types.CodeType] = set()
    for base in kind.__mro__:
        if not _own(base):
            continue
        for item in vars(base).values():
            item = getattr(item, "__func__", getattr(item, "fget", item))
            _collect(item, found)
    return any("training" in code.co_names for code in found)


def _collect(function: Any, found: set[types.CodeType]) -> None:
    """The code of a function, of those it holds, and of those of its own module that it calls."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, types.FunctionType) or function.__code__ in found:
        return
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        found.add(code)
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType) and c not in found)
        for name in code.co_names:
            other = function.__globals__.get(name)
            if isinstance(other, types.FunctionType) and other.__module__ == function.__module__:
                _collect(other, found)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Eval mode, or training mode of the model's own modules; the modes, chance and counters come back afterwards.

    torch's own layers stay in eval mode: training changes which numbers they use, not which parameters, and a batch
    norm would refuse an example of one.
    """
    held = [b for m in model.modules() for b in m._buffers.values() if b is not None]
    counters = [(b, b.clone()) for b in held if not b.is_floating_point() and b.device.type != "meta"]
    chance = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(_SEED)
    np.random.seed(_SEED)
    random.seed(_SEED)
    try:
        with bridge.evaluating(model):
            for module in model.modules() if training else ():
                if _own(type(module)):
                    module.training = True
            yield
    finally:
        torch.set_rng_state(chance[0])
        np.random.set_state(chance[1])
        random.setstate(chance[2])
        with torch.no_grad():
            for buffer, value in counters:
                buffer.copy_(value)
