"""A model that is a chain of blocks: batches go through one block at a time, fed from memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from slimkit import bridge
from slimkit.core.errors import ArgumentError
from slimkit.core.weights.influence import find_stack
from slimkit.replay import replaying

import torch
from torch import nn

# (what the model takes, what leaves the block before) -> what leaves the block
Send = Callable[[Any, "torch.Tensor | None"], "torch.Tensor | None"]


class _Arrived(Exception):
    """Raised inside a forward to end it."""


class BlockChain:
    """Sends batches through one block of a model after another.

    The model's own code runs up to the block, with the blocks before it left out: what it makes for each block on the
    way (masks, positions) is made as ever.

    Args:
        model: the model.
        blocks: the blocks' paths.
        wraps: whether blocks give a tuple; found out where one runs.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], wraps: bool = False) -> None:
        self._model = model
        self._modules = [bridge.get_module(model, path) for path in blocks]
        self._wraps = wraps

    def run(
        self, batch: Any, block: int, hidden: torch.Tensor | None, until: nn.Module | None = None
    ) -> torch.Tensor | None:
        """Send one batch through one block; see `at`."""
        with self.at(block, until) as send:
            return send(batch, hidden)

    @contextlib.contextmanager
    def at(self, block: int, until: nn.Module | None = None) -> Iterator[Send]:
        """A function that sends a batch through one block, while the context is open.

        It takes what the model takes and what leaves the block before it, which is None for the first one; it returns
        the hidden states that leave the block.

        Args:
            block: the block's number.
            until: a layer in it after whose call the forward ends; then nothing is returned.
        """
        entering, nothing = cast("torch.Tensor | None", None), contextlib.nullcontext()
        left: list[torch.Tensor] = []

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._wraps = isinstance(output, (tuple, list))
            found = hidden_of(output)
            if found is None:
                raise TypeError(f"block {block} hands over no tensor of numbers")
            left.append(found.detach())
            raise _Arrived

        def enough(*_: Any) -> None:
            raise _Arrived

        def passing(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                x = hidden_of((*args, *kwargs.values()))
                if number == block - 1 and entering is not None:
                    x = entering.clone()  # a block may add to what it is given, in place, and will be run again
                return (x,) if self._wraps else x

            return forward

        with contextlib.ExitStack() as stack:
            for number, early in enumerate(self._modules[:block]):
                early.__dict__["forward"] = passing(number)
                stack.callback(early.__dict__.pop, "forward")
            stack.callback(self._modules[block].register_forward_hook(after).remove)
            idle = [m for m in self._modules if m is not self._modules[block]]
            run = stack.enter_context(replaying(self._model, idle))

            def send(batch: Any, hidden: torch.Tensor | None) -> torch.Tensor | None:
                nonlocal entering
                entering = hidden
                left.clear()
                # Registered now, so that hooks registered before this batch see the layer's call.
                with (
                    contextlib.suppress(_Arrived),
                    until.register_forward_hook(enough) if until is not None else nothing,
                ):
                    run(batch)
                return left[0] if left else None

            yield send

    def rest(self, batch: Any, hidden: torch.Tensor) -> Any:
        """What the model gives for a batch of which these hidden states leave the last block; no block runs.

        Args:
            batch: what the model takes.
            hidden: what left the last block.
        """

        def forward(number: int, *args: Any, **kwargs: Any) -> Any:
            x = hidden if number == len(self._modules) - 1 else hidden_of((*args, *kwargs.values()))
            return (x,) if self._wraps else x

        with contextlib.ExitStack() as stack:
            for number, module in enumerate(self._modules):
                module.__dict__["forward"] = partial(forward, number)
                stack.callback(module.__dict__.pop, "forward")
            return stack.enter_context(replaying(self._model, self._modules))(batch)


def hidden_of(value: Any) -> torch.Tensor | None:
    """The hidden states in what a block takes or returns: the first tensor of floating-point numbers."""
    values: Iterable[Any] = value if isinstance(value, (tuple, list)) else (value,)
    return next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)


def stack_of(model: nn.Module) -> list[str]:
    """The paths of a model's blocks; see `find_stack`."""
    modules = dict(model.named_modules())
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in modules.items()}
    return find_stack({path: type(module).__name__ for path, module in modules.items()}, sizes)


def find_blocks(model: nn.Module, batch: Any) -> list[str]:
    """The paths of a model's blocks where it is a chain of them, proven on a batch; else none."""
    try:
        blocks = stack_of(model)
    except ArgumentError:
        return []
    outputs: list[torch.Tensor | None] = []

    def left(_path: str, _args: Any, _kwargs: Any, output: Any) -> None:
        found = hidden_of(output)
        outputs.append(None if found is None else found.detach().clone())

    with replaying(model) as run, bridge.hooked({b: bridge.get_module(model, b) for b in blocks}, left):
        run(batch)
    if len(outputs) != len(blocks):
        return []
    chain, hidden = BlockChain(model, blocks), None
    for number, output in enumerate(outputs):
        try:
            hidden = chain.run(batch, number, hidden)
        except Exception:  # noqa: BLE001  (a block that asks for what another one made fails in its own way)
            return []
        if hidden is None or output is None or not torch.equal(hidden, output):
            return []
    return list(blocks)
