"""A model while it is traced: which module runs, which tensors it owns and answers with, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)
from slimkit.kinds import is_layer

import torch
from torch import nn

# Results that a Hugging Face model returns beside its answer; they tie nothing that the answer does not.
_BYPRODUCTS = (
    "past_key_values hidden_states attentions encoder_last_hidden_state encoder_hidden_states encoder_attentions "
    "decoder_hidden_states decoder_attentions cross_attentions reshaped_hidden_states router_logits aux_loss"
)
BYPRODUCTS = frozenset(_BYPRODUCTS.split())

_HOOKS = frozenset(
    {
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    }
)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and floating-point buffers by path, tied ones under every one of their names; the zero points of fake
    quantisation too, which are whole numbers, one a channel."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_floating_point() or path.endswith(".zero_point"):
            yield path, buffer


def answers(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a model's output, without the by-products."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if key not in BYPRODUCTS:
                yield from answers(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from answers(value)
    elif hasattr(output, "__dict__") and type(output).__name__.endswith(("Output", "Result")):
        yield from answers(vars(output))


@contextlib.contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Take back what the forward pass leaves in modules, such as caches, which would hold tensors without values."""
    kept = []
    for module in model.modules():
        state = dict(vars(module))
        own = not type(module).__module__.startswith("torch.nn.")
        # Hooks too: a module that hooks its children once notes it in an attribute, and both must go together.
        inner = {k: copy.copy(v) for k, v in state.items() if k in _HOOKS or (own and type(v) in (dict, list))}
        kept.append((module, state, inner))
    try:
        yield
    finally:
        for module, state, inner in kept:
            vars(module).clear()
            vars(module).update(state)
            for key, value in inner.items():
                held = state[key]
                if isinstance(held, dict):
                    held.clear()
                    held.update(value)
                else:
                    held[:] = value


@contextlib.contextmanager
def watched(model: nn.Module, scopes: list[str], crossed: Callable[[str, Any], None]) -> Iterator[list[str]]:
    """Keep `scopes` the stack of running modules, and give the layers in the order they ran when the context closes.

    Args:
        model: the model.
        scopes: the stack; the last one is the module whose code runs.
        crossed: called with (path of the module around, output) whenever a module ends.

    Yields:
        The paths of the layers, once the context has closed.
    """
    order: dict[nn.Module, None] = {}
    paths = {m: n for n, m in model.named_modules()}
    handles = []

    def enter(module: nn.Module, _args: Any) -> None:
        scopes.append(paths[module])

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        scopes.pop()
        order.setdefault(module)
        crossed(scopes[-1], _out)

    def seen(module: nn.Module, _args: Any) -> None:
        order.setdefault(module)

    for module in paths:
        if is_layer(module):
            handles.append(module.register_forward_pre_hook(seen))
        elif module._modules or module._parameters or type(module).__module__.partition(".")[0] != "torch":
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    layers: list[str] = []
    try:
        yield layers
        layers.extend(paths[m] for m in order if is_layer(m))
    finally:
        for handle in handles:
            handle.remove()
