"""torch's own transformer parts: multi-head attention with a prefix, and encoders kept off their fast paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from slimkit import bridge
from slimkit.attention import PrunedMultiheadAttention
from slimkit.delta.layer import DeltaLayer

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["bridge", "call_layers", "prefixed_multihead", "watching_multihead", "without_call_layers"]

NESTED = "nested_tensors_before_delta"


class _Extended(PrunedMultiheadAttention):
    """`nn.MultiheadAttention` whose keys, values and mask have a prefix in front."""

    def extend(
        self, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        prefixed: Any = self
        if not prefixed.delta_acts:
            return k, v, mask
        keys, values = prefixed.keys_and_values()
        k = torch.cat((prefixed.prefix_for(keys, k), k), 2)
        v = torch.cat((prefixed.prefix_for(values, v), v), 2)
        return k, v, None if mask is None else F.pad(mask, (keys.shape[0], 0))


def prefixed_multihead(module: nn.Module, marked: type) -> type | None:
    """The class that makes a multi-head attention one with a prefix, of the mark `marked`; None for other modules."""
    if not _is_plain(module):
        return None
    return type("PrefixedMultiheadAttention", (marked, _Extended), {"forward": PrunedMultiheadAttention.forward})


def _is_plain(module: nn.Module) -> bool:
    plain = (nn.MultiheadAttention.forward, PrunedMultiheadAttention.forward)
    return isinstance(module, nn.MultiheadAttention) and type(module).forward in plain


@contextlib.contextmanager
def watching_multihead(model: nn.Module) -> Iterator[list[tuple[Any, torch.Tensor, torch.Tensor]]]:
    """Note module, keys and values (batch, heads, tokens, width) of every plain multi-head attention that runs."""
    seen: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    class Watched(PrunedMultiheadAttention):
        def extend(self, k: Any, v: Any, mask: Any) -> Any:
            seen.append((self, k, v))
            return k, v, mask

    before = [(m, type(m)) for m in model.modules() if _is_plain(m)]
    try:
        for module, kind in before:
            module.__class__ = type(kind.__name__, (Watched, kind), {})
        yield seen
    finally:
        for module, kind in before:
            module.__class__ = kind


def call_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Keep torch's encoder from reading the weights of layers with a delta instead of calling them, in place."""
    if not any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
        return
    for path, module in modules.items():
        parent = bridge.get_module(model, path.rpartition(".")[0])
        called = any(hook is _nothing for hook in module._forward_pre_hooks.values())
        if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(module, DeltaLayer) and not called:
            # Its fast path looks for hooks, and calls the layers where it finds one.
            module.register_forward_pre_hook(_nothing)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            # Under a padding mask it would hand nested tensors to layers that only the fast path can read.
            setattr(module, NESTED, True)
            module.use_nested_tensor = False


def without_call_layers(model: nn.Module) -> None:
    """Undo `call_layers`, in place."""
    for module in model.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _nothing:
                del module._forward_pre_hooks[handle]
        if getattr(module, NESTED, False):
            delattr(module, NESTED)
            module.use_nested_tensor = True


def _nothing(_module: nn.Module, _args: Any) -> None:
    return None
