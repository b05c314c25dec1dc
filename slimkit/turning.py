"""A torch model on other axes: parameters get other values of their shape, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from slimkit.surgery import Changes, set_data, tensors
from slimkit.trace.watch import named_tensors

import torch
from torch import nn

Array = np.ndarray[Any, Any]


def first_names(model: nn.Module) -> dict[str, str]:
    """Every path of a parameter or buffer -> the first of those under which its tensor stands."""
    first = {id(t): p for p, t in tensors(model).items()}
    return {path: first[id(tensor)] for path, tensor in named_tensors(model)}


def turn(model: nn.Module, values: Iterable[tuple[str, Array]], parted: Mapping[str, str]) -> Callable[[], None]:
    """Give parameters other values of their shape, in place; on an error the model is as it was.

    Args:
        model: the model.
        values: path and values; all are computed from the model before the first is written.
        parted: parameters that share their tensor with another one, and get one of their own: path -> the other.

    Returns:
        A call that takes it back.
    """
    changes, done = Changes(), list[Callable[[], None]]()

    def undo() -> None:
        for take_back in reversed(done):
            take_back()
        done.clear()
        changes.undo()

    made = [(path, torch.from_numpy(np.ascontiguousarray(value))) for path, value in values]
    try:
        known = dict(named_tensors(model))
        for path, table in parted.items():
            if path not in known or known[path] is not known.get(table):
                continue  # apart already
            module, _, name = path.rpartition(".")
            own = nn.Parameter(known[table].detach().clone(), known[table].requires_grad)
            changes.put(model.get_submodule(module)._parameters, name, own)
        known = dict(named_tensors(model))
        for path, value in made:
            tensor = known[path]
            done.append(partial(set_data, tensor, tensor.data, tensor.grad))
            set_data(tensor, value.to(tensor), None)
    except BaseException:
        undo()
        raise
    return undo
