"""Reading tensors inside a model while it runs: hooks that keep one tensor each, and only when asked to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slimkit import bridge
from slimkit.core.distill.config import Index, SoftLabel
from slimkit.core.distill.shapes import pick
from slimkit.core.errors import ConfigError

import torch


class Store:
    """What the taps of one model saw during the present forward."""

    def __init__(self) -> None:
        self.listening = False
        self.seen: dict[int, torch.Tensor] = {}


class Tap:
    """A forward hook that keeps one tensor of a module; a class, so that a copied model's hooks fill its own store."""

    def __init__(self, store: Store, place: int, path: str, side: str, index: Index) -> None:
        self.store, self.place, self.path, self.side, self.index = store, place, path, side, index

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Outside the distillation model's forward (evaluation, recomputation in backward) nothing is kept.
        if not self.store.listening:
            return
        if self.side == "input":
            value: Any = kwargs if isinstance(self.index, str) else (*args, *kwargs.values())
        else:
            value = output
        self.store.seen[self.place] = pick(value, self.index, f"{self.path} ({self.side})")


def attach(model: torch.nn.Module, store: Store, labels: Iterable[SoftLabel], role: str) -> None:
    """Hook the modules that the labels name, in place.

    Args:
        model: teacher or student.
        store: where the tensors go, by the label's place.
        labels: the soft labels; those without modules need no hook.
        role: "t" or "s".

    Raises:
        ConfigError: a module that the model does not have.
    """
    found = []
    for place, label in enumerate(labels):
        read = label.read(role)
        if (path := read.module) is None:
            continue
        try:
            module = bridge.get_module(model, path)
        except ValueError as error:
            raise ConfigError(f"{role}_module of {label.label}: {error}") from None
        found.append((module, Tap(store, place, path, read.side, read.index)))
    for module, tap in found:
        module.register_forward_hook(tap, with_kwargs=True)


def detach(model: torch.nn.Module, store: Store) -> None:
    """Remove the hooks that fill the store, in place."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Tap) and hook.store is store:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
