"""A torch model on other axes or scales: parameters get other values of their shape, all or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError
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


def rescale(model: nn.Module, *changes: Mapping[str, tuple[int, Array]]) -> Callable[[], None]:
    """Multiply parameters by powers of two, in place; on an error the model is as it was.

    Args:
        model: the model.
        changes: parameter -> an axis, and for each of its indices the power.

    Returns:
        A call that takes it back.
    """
    # What was done; the values before it only where multiplying back would not restore them.
    done: list[tuple[str, int, Array, torch.Tensor | None]] = []

    def times(axis: int, powers: Array, value: torch.Tensor) -> torch.Tensor:
        shape = [len(powers) if k == axis else 1 for k in range(value.ndim)]
        # Not ldexp, which is no kernel of every device.
        factors = torch.from_numpy(np.ldexp(1.0, powers.reshape(shape)).astype(np.float32)).to(value)
        return value * factors

    def undo() -> None:
        with torch.no_grad():
            for path, axis, powers, before in reversed(done):
                value = model.get_parameter(path).detach()
                value.copy_(times(axis, -powers, value) if before is None else before)
        done.clear()

    try:
        with torch.no_grad():
            for path, (axis, powers) in (item for one in changes for item in one.items()):
                value = model.get_parameter(path).detach()
                made = times(axis, powers, value)
                if not bool(torch.isfinite(made).all()):
                    raise ArgumentError(f"{path} must hold values that {value.dtype} holds times {2 ** powers.max()}")
                whole = torch.equal(times(axis, -powers, made), value)
                done.append((path, axis, powers, None if whole else value.clone()))
                value.copy_(made)
    except BaseException:
        undo()
        raise
    return undo
