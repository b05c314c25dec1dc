"""What a learning-rate scheduler remembers: MindSpore's own write no state down, so it is read off them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from slimkit.core.errors import UnsupportedError
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn, ops

_OWN = "mindspore.experimental.optim.lr_scheduler"


def _is_own(value: Any) -> bool:
    return any(kind.__module__ == _OWN for kind in type(value).__mro__)


def _tells(scheduler: Any) -> bool:
    return hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")


def _leaves(scheduler: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(path, holder, key, value) of all that a scheduler of MindSpore's own holds, save code and the optimizer."""
    for key, value in vars(scheduler).items():
        yield from _below(vars(scheduler), key, value, f"{path}{key}")


def _below(holder: Any, key: Any, value: Any, path: str) -> Iterator[tuple[str, Any, Any, Any]]:
    if isinstance(value, (nn.Cell, ops.Primitive)) or inspect.isroutine(value) or inspect.isclass(value):
        return
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from _below(value, place, item, f"{path}.{place}")
    elif _is_own(value):
        yield from _leaves(value, f"{path}.")
    else:
        yield path, holder, key, value


def parameters_of(scheduler: Any) -> list[ms.Parameter]:
    """The counters that a scheduler of MindSpore's own keeps; those of others are in their state_dict."""
    if not _is_own(scheduler) or _tells(scheduler):
        return []
    return [value for _, _, _, value in _leaves(scheduler) if isinstance(value, ms.Parameter)]


def state_of(scheduler: Any) -> Any:
    """A scheduler's state as plain values and arrays, without what `parameters_of` names; None for no scheduler.

    Raises:
        UnsupportedError: it has no state that could be put back.
    """
    if scheduler is None or not hasattr(scheduler, "step"):
        return None
    if _tells(scheduler):
        return scheduler.state_dict()
    if not _is_own(scheduler):
        raise UnsupportedError(
            f"a checkpoint cannot hold a {type(scheduler).__name__}: it lacks state_dict and load_state_dict"
        )
    found = {path: value for path, _, _, value in _leaves(scheduler) if not isinstance(value, ms.Parameter)}
    return {path: bridge.as_numpy(v) if isinstance(v, ms.Tensor) else v for path, v in found.items()}


def put_back(scheduler: Any, state: Any) -> None:
    """Give a scheduler the state that `state_of` gave, in place."""
    if _tells(scheduler):
        scheduler.load_state_dict(state)
        return
    for path, holder, key, value in list(_leaves(scheduler)):
        if path in state:
            holder[key] = ms.Tensor(state[path], value.dtype) if isinstance(value, ms.Tensor) else state[path]
