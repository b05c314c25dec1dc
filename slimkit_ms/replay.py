"""Sending batches through a MindSpore cell again and again: each as if it were the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from slimkit.core import replay
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

# What every cell has is no state of a forward.
_EVERY = frozenset(vars(nn.Cell())) | {replay.PLANS}


class _Tensors:
    """MindSpore's part of `core.replay`."""

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, ms.Tensor) and not isinstance(value, ms.Parameter)

    def is_module(self, value: Any) -> bool:
        return isinstance(value, (nn.Cell, ms.Parameter))

    def clone(self, tensor: ms.Tensor) -> ms.Tensor:
        return tensor.copy()

    def remember(self, tensor: ms.Tensor) -> ms.Tensor:
        return tensor.value().copy() if isinstance(tensor, ms.Parameter) else tensor.copy()

    def changed(self, tensor: ms.Tensor, before: ms.Tensor) -> bool:
        return tensor.shape != before.shape or not bool((tensor == before).all())

    def put_back(self, tensor: ms.Tensor, before: ms.Tensor) -> None:
        if isinstance(tensor, ms.Parameter):
            tensor.set_data(before.copy(), slice_shape=tensor.shape != before.shape)
        else:
            tensor.assign_value(before.copy())


TENSORS = _Tensors()


def state_of(model: nn.Cell) -> replay.State:
    """What a forward in eval mode may change of a cell: plain attributes, and parameters that are state.

    MindSpore has no buffers: caches, counters and positions are parameters that do not train. Where nothing trains
    that says nothing, and only what is no matrix of numbers counts as state.
    """
    holders: list[tuple[dict[str, Any], frozenset[str]]] = []
    held: list[ms.Parameter] = []
    for _, cell in model.cells_and_names():
        if not replay.is_own(type(cell)):
            holders.append((vars(cell), _EVERY))
            held += [p for p in cell._params.values() if p is not None and not p.requires_grad]
    if not any(p.requires_grad for p in model.get_parameters()):
        held = [p for p in held if p.ndim < 2 or not p.is_floating_point()]
    return replay.State(holders, TENSORS, held)


@contextlib.contextmanager
def unchanged(model: nn.Cell) -> Iterator[None]:
    """Put the state that a forward leaves behind back afterwards, also after an error."""
    state = state_of(model)
    try:
        yield
    finally:
        state.restore()


@contextlib.contextmanager
def quiet(model: nn.Cell) -> Iterator[None]:
    """PyNative and eval mode, without key-value caches."""
    configs = {
        id(c): c for _, cell in model.cells_and_names() for c in [getattr(cell, "config", None)] if c is not None
    }
    cached: list[Any] = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        for config in cached:
            config.use_cache = False
        with bridge.pynative(), bridge.evaluating(model):
            yield
    finally:
        for config in cached:
            config.use_cache = True


@contextlib.contextmanager
def replaying(model: nn.Cell) -> Iterator[Callable[[Any], Any]]:
    """In `quiet`, a function that sends a batch through the cell as if it were the first.

    Nothing that an earlier batch left in the cell (a cache, a counter, a hidden state) is there, and nothing that it
    was given is changed.
    """

    def run(batch: Any) -> Any:
        args, kwargs = replay.fresh(bridge.call_of(batch), TENSORS)
        with unchanged(model):
            return model(*args, **kwargs)

    with quiet(model):
        yield run
