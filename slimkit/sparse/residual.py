"""Where a layer's output has joined the residual stream of its block, found by trying rather than by names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.sparse.call_order import TOLERANCE

import torch


def first_tensor(value: Any) -> Any:
    """The hidden states in a block's output: itself, or the first of a tuple."""
    return value[0] if isinstance(value, (tuple, list)) else value


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's input as it was passed; None for a call without any."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextlib.contextmanager
def arriving(block: torch.nn.Module, paths: Sequence[str], seen: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``seen(path, tensor)`` with what enters the modules at those paths; "" stands for what leaves the block."""

    def before(path: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen(path, input_of(args, kwargs))

    handles = [
        block.register_forward_hook(lambda _module, _args, output: seen("", first_tensor(output)))
        if path == ""
        else bridge.get_module(block, path).register_forward_pre_hook(before(path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def joints(block: torch.nn.Module, run: Callable[[], None], layers: Sequence[str]) -> dict[str, str]:
    """For each layer the first place behind it that sees its output plus something else, unchanged.

    The output of each layer is disturbed in turn. Where the disturbance arrives as it was, the value there is
    the output plus a part that the layer does not decide: the residual stream.

    Args:
        block: the block, in eval mode.
        run: sends one batch through it.
        layers: paths of layers in the block.

    Returns:
        layer -> path of the module that is called with the sum, "" for the block's own output; layers without such
        a place are left out.
    """
    places = [p for p, m in block.named_modules() if p and not any(m.children())] + [""]

    def look(disturb: str | None, by: torch.Tensor | None) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}  # in the order of the calls

        def note(path: str, x: Any) -> None:
            if isinstance(x, torch.Tensor) and path not in found:
                found[path] = x.detach().clone()

        hook = None
        if disturb is not None:
            hook = bridge.get_module(block, disturb).register_forward_hook(lambda _m, _a, output: output + by)
        try:
            with arriving(block, places, note):
                run()
        finally:
            if hook is not None:
                hook.remove()
        return found

    outputs: dict[str, torch.Tensor] = {}

    def left(path: str, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
        outputs.setdefault(path, output.detach().clone())  # a sum may be made in its memory

    with bridge.hooked({p: bridge.get_module(block, p) for p in layers}, left):
        calm = look(None, None)
    found: dict[str, str] = {}
    for layer, y in outputs.items():
        if not any(x.shape == y.shape and not torch.equal(x, y) for x in calm.values()):
            continue
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        noise *= y.float().square().mean().sqrt().to(y)
        for path, x in look(layer, noise).items():
            before = calm.get(path)
            if path == layer or before is None or before.shape != y.shape or torch.equal(before, y):
                continue
            change = (x.float() - before.float()) - noise.float()
            if float(change.norm()) < TOLERANCE * float(noise.float().norm()):
                found[layer] = path
                break
    return found
