"""Sending batches through a torch model again and again: each as if it were the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from slimkit import bridge
from slimkit.core import replay
from slimkit.core.batch import Call, as_call

import torch

# What every module has is no state of a forward; its buffers are asked for by themselves. Hooks that transformers put
# on a model's modules stay: without its note of that, the next forward would put them there once more.
_NOTES = {"_hf_hook", "_old_forward", "_output_capturing_hooks_installed", replay.PLANS}
_EVERY = frozenset(vars(torch.nn.Module())) | _NOTES
_NONE: frozenset[str] = frozenset()


def version_of(tensor: Any) -> int | None:
    """How often a tensor was written into; None where nobody counts."""
    counted = isinstance(tensor, torch.Tensor) and not tensor.is_inference()
    return tensor._version if counted else None


class _Tensors:
    """torch's part of `core.replay`: a tensor counts the writes into it."""

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)

    def is_module(self, value: Any) -> bool:
        return isinstance(value, (torch.nn.Module, torch.nn.Parameter))

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def remember(self, tensor: torch.Tensor) -> tuple[int | None, torch.Tensor]:
        return version_of(tensor), tensor.detach().clone()

    def changed(self, tensor: torch.Tensor, before: tuple[int | None, torch.Tensor]) -> bool:
        return before[0] is None or tensor._version != before[0]

    def put_back(self, tensor: torch.Tensor, before: tuple[int | None, torch.Tensor]) -> None:
        with torch.no_grad():
            if tensor.shape == before[1].shape:
                tensor.copy_(before[1])
            else:
                tensor.set_(before[1])  # resized in place


TENSORS = _Tensors()


def running(model: torch.nn.Module, idle: Iterable[torch.nn.Module] = ()) -> list[torch.nn.Module]:
    """The modules of a model, without some and what only these hold."""
    seen = {id(module) for module in idle}
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting += module.children()
    return found


def state_of(modules: Iterable[torch.nn.Module]) -> replay.State:
    """What a forward in eval mode may change of modules: buffers, plain attributes, and parameters that count."""
    holders: list[tuple[dict[str, Any], frozenset[str]]] = []
    counts: list[torch.Tensor] = []
    for module in modules:
        if not replay.is_own(type(module)):
            holders += [(vars(module), _EVERY), (module._buffers, _NONE)]
            # A counter or a position is a parameter only in that it never trains.
            own = [p for p in module._parameters.values() if p is not None]
            counts += [p.detach() for p in own if not p.requires_grad and p.ndim < 2]
    return replay.State(holders, TENSORS, counts)


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Put the state that a forward leaves behind back afterwards, also after an error."""
    with _unchanged(model.modules()):
        yield


@contextlib.contextmanager
def _unchanged(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    state = state_of(modules)
    try:
        yield
    finally:
        state.restore()


@contextlib.contextmanager
def quiet(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, caches or fused paths that would pass the layers by."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with bridge.evaluating(model), _configured(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def replaying(
    model: torch.nn.Module, idle: Collection[torch.nn.Module] | None = None
) -> Iterator[Callable[[Any], Any]]:
    """In `quiet`, a function that sends a batch through the model as if it were the first.

    Nothing that an earlier batch left in the model (a cache, a counter, a hidden state) is there, and nothing that it
    was given is changed.

    Args:
        model: the model.
        idle: modules that do not run; where they are known, the others are looked for once and not for every batch.
    """
    known = None if idle is None else running(model, idle)

    def run(batch: Any) -> Any:
        args, kwargs = replay.fresh(as_call(batch), TENSORS)
        if not isinstance(batch, Call):  # what one part of the model gave another is where it belongs
            args, kwargs = bridge.to_device((args, kwargs), bridge.device_of(model))
        with _unchanged(model.modules() if known is None else known):
            return model(*args, **kwargs)

    with quiet(model):
        yield run


@contextlib.contextmanager
def entering(modules: Mapping[str, torch.nn.Module], seen: Callable[..., None]) -> Iterator[None]:
    """Call ``seen(path, args, kwargs)`` before each forward of the modules, while the context is open."""

    def hook(path: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen(path, args, kwargs)

    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _configured(model: torch.nn.Module) -> Iterator[None]:
    """No key-value cache, which would meet the next forward; and experts of transformers one by one.

    Its other ways copy the experts' weights, or hide the rows of each expert. An encoder and a decoder have a
    configuration each.
    """
    configs: dict[int, Any] = {}
    waiting = [c for m in model.modules() for c in [getattr(m, "config", None)] if c is not None]
    while waiting:
        config = waiting.pop()
        if id(config) in configs or not isinstance(replay.vars_of(config), dict):
            continue
        configs[id(config)] = config
        waiting += [v for k, v in vars(config).items() if k.endswith("config") or hasattr(v, "use_cache")]
    before: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        if getattr(config, "use_cache", None) is True:
            before.append((config, "use_cache", True))
            config.use_cache = False
        if "_experts_implementation_internal" in vars(config):
            before.append((config, "_experts_implementation_internal", config._experts_implementation_internal))
            config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
