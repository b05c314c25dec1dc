"""A model without values that runs all the same: each block has its own while it is called, and one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from slimkit import bridge
from slimkit.chain import stack_of
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.stored import fill, held, to_meta

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class LentModel:
    """Lends a model its values: those outside its blocks for good, those of one block at a time.

    Args:
        model: the model on the meta device; not one that others look at.
        value: first name of a parameter or buffer -> its values; None for a buffer that no file holds.

    Attributes:
        model: the model.
        recomputing: whether a block is being run once more for its way back.

    Raises:
        UnsupportedError: no list of equal blocks was found.
    """

    def __init__(self, model: nn.Module, value: Callable[[str], torch.Tensor | None]) -> None:
        self.model, self._value, self.recomputing = model, value, False
        try:
            self.blocks = stack_of(model)
        except ArgumentError as error:
            raise UnsupportedError(
                f"calibration walks a folder block by block, and its model has none: {error}"
            ) from None
        self._modules = {path: bridge.get_module(model, path) for path in self.blocks}
        self._current = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Let the model run while the context is open."""
        inside = tuple(f"{path}." for path in self.blocks)
        made: dict[int, nn.Parameter] = {}
        for name, old in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(inside):
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(self._read(name), requires_grad=False)
                path, _, key = name.rpartition(".")
                self.model.get_submodule(path)._parameters[key] = made[id(old)]
        for name in self.model.state_dict():
            tensor = held(self.model, name)
            if not isinstance(tensor, nn.Parameter) and (stored := self._value(name)) is not None:
                tensor.copy_(stored)
        handles = [
            module.register_forward_pre_hook(lambda *_, path=path: self._entering(path), prepend=True)
            for path, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.release()

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Keep nothing inside a block for the way back but what enters it: the block is run once more then."""

        def again() -> Any:
            @contextlib.contextmanager
            def recomputed() -> Iterator[None]:
                self.recomputing = True
                try:
                    yield
                finally:
                    self.recomputing = False

            return contextlib.nullcontext(), recomputed()

        def wrapped(path: str, module: nn.Module) -> Callable[..., Any]:
            own = module.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                self.lend(path)
                return own(*args, **kwargs)

            def forward(*args: Any, **kwargs: Any) -> Any:
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=again, **kwargs)

            return forward

        for path, module in self._modules.items():
            module.__dict__["forward"] = wrapped(path, module)
        try:
            yield
        finally:
            for module in self._modules.values():
                module.__dict__.pop("forward")

    def lend(self, path: str) -> None:
        """Give the block that a module is or lies in its values, in place; another block's go."""
        block = next((b for b in self.blocks if path == b or path.startswith(f"{b}.")), "")
        if not block or block == self._current:
            return
        self.release()
        module = self._modules[block]
        values = {f"{block}.{n}": self._read(f"{block}.{n}") for n, _ in module.named_parameters()}
        fill(module, block, values)
        self._current = block

    def release(self) -> None:
        """Take the values of the last block away, in place."""
        if self._current:
            to_meta(self._modules[self._current])
        self._current = ""

    def _read(self, name: str) -> Any:
        value = self._value(name)
        assert value is not None, name
        return value

    def _entering(self, path: str) -> None:
        if "forward" not in vars(self._modules[path]):  # else the block is passed over, or lends itself
            self.lend(path)
