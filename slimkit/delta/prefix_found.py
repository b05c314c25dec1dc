"""Where a model's attention is, found by watching one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.delta import prefix as rules
from slimkit.core.errors import UnsupportedError
from slimkit.core.weights.heads import heads_told_by
from slimkit.delta.multihead import watching_multihead
from slimkit.delta.written import Watched, edited_class, written_attention

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Found", "attention_kernel", "bridge", "find_attention", "inspect_call"]


class Found:
    """What was seen of one attention layer: its module, and the keys and values (batch, heads, tokens, width)."""

    def __init__(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        self.module, self.key, self.value = module, key.detach(), value.detach()

    @classmethod
    def written(cls, module: nn.Module, batch: int) -> Found:
        """Of the shapes (batch, heads, tokens, width), (batch * heads, tokens, width) or (tokens, width)."""
        pair = [vars(module)[name] for name in ("seen_keys", "seen_values")]
        if pair[0].ndim != 4:
            pair = [t.reshape(batch if t.ndim == 3 else 1, -1, *t.shape[-2:]) for t in pair]
        return cls(module, *pair)

    def seen(self) -> rules.Seen:
        """Heads, width, and the rows of the first sample."""
        facts = heads_told_by(self.module) or heads_told_by(getattr(self.module, "config", None))
        told = facts.keys if facts is not None else None
        queries = int(self.key.shape[1])
        # Where queries share keys, some kernels get the keys repeated; the prefix holds each of them once.
        heads = told if told and queries % told == 0 else queries
        rows = [t[0, :: queries // heads].transpose(0, 1) for t in (self.key, self.value)]
        rows = [t.reshape(t.shape[0], -1) for t in rows]  # (tokens, heads * width)
        return rules.Seen(heads, int(self.key.shape[-1]), queries, rows[0], rows[1])


class _Watch(TorchFunctionMode):
    """Note every call of scaled_dot_product_attention with the module it happens in."""

    def __init__(self, stack: list[nn.Module]) -> None:
        super().__init__()
        self.stack, self.calls = stack, []  # type: ignore[var-annotated]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = inspect_call(args, kwargs)
            self.calls.append(Found(self.stack[-1], call["key"], call["value"]))
        return func(*args, **kwargs)


def inspect_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call of scaled_dot_product_attention by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args)), **kwargs}


def attention_kernel(model: nn.Module) -> list[tuple[Any, str]]:
    """Make Hugging Face parts use scaled_dot_product_attention; gives what to put back."""
    changed: list[tuple[Any, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if kernel not in (None, "sdpa") and all(config is not c for c, _ in changed):
            changed.append((config, kernel))
            config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    return changed


def find_attention(model: nn.Module, inputs: Any) -> dict[str, rules.Seen]:
    """Run the model once and see where attention happens.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention, nn.MultiheadAttention, or written as
            two matrix products around a softmax.
        inputs: one batch; None takes a Hugging Face model's own dummy inputs.

    Returns:
        Path -> what was seen of the attention layer, in the order they ran, each once.

    Raises:
        ArgumentError: no inputs to run on.
        UnsupportedError: no attention was seen.
    """
    if inputs is None:
        inputs = getattr(model, "dummy_inputs", None)
        if inputs is None:
            check.wrong_value("inputs", "one batch to run the model on, to see where its attention is", inputs)
    written, unfit = written_attention(model)
    plain = {m: type(m) for m in written.values()}
    stack: list[nn.Module] = [model]
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _args: stack.append(m)))
        handles.append(module.register_forward_hook(lambda _m, _args, _out: stack.pop() and None, always_call=True))
    found: dict[int, Found] = {}
    try:
        for module, kind in plain.items():
            module.__class__ = edited_class(kind, Watched)
        with bridge.evaluating(model), watching_multihead(model) as multihead, _Watch(stack) as watch:
            bridge.run(model, inputs)
        for module in plain:
            if "seen_values" in vars(module):
                found[id(module)] = Found.written(module, _batch_of(inputs))
    finally:
        for handle in handles:
            handle.remove()
        for module, kind in plain.items():
            module.__class__ = kind
            for name in ("seen_keys", "seen_values"):
                vars(module).pop(name, None)
    for call in [*watch.calls, *(Found(*call) for call in multihead)]:
        found.setdefault(id(call.module), call)
    if not found:
        raise UnsupportedError(
            rules.nothing_found(
                "torch.nn.functional.scaled_dot_product_attention, nn.MultiheadAttention, or a softmax between two "
                "matrix products",
                unfit,
            )
        )
    return {path: found[id(m)].seen() for path, m in bridge.named_modules(model) if id(m) in found}


def _batch_of(inputs: Any) -> int:
    args, kwargs = as_call(inputs)
    parts = (*args, *kwargs.values())
    return next((int(p.shape[0]) for p in parts if isinstance(p, torch.Tensor) and p.ndim), 1)
