"""Prefixes for the attention layers of a model nobody edits: found by watching, extended where attention runs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta.layers import rate, size
from slimkit.core.delta.named import OneAdapter
from slimkit.core.errors import PatternError, UnsupportedError
from slimkit.core.match import demand, match
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.prefix import PrefixLayer

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Found", "Prefixed", "bridge", "find_attention", "put_prefix"]

ROWS = "mindpet_delta_prefixtuning"


class Found:
    """What was seen of one attention layer: its module, heads and head width, and the keys and values of the run."""

    def __init__(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        self.module, self.key, self.value = module, key.detach(), value.detach()
        config = getattr(module, "config", None)
        told = getattr(config, "num_key_value_heads", None)
        # Where queries share keys, some kernels get the keys repeated; the prefix holds each of them once.
        self.heads = told if told and key.shape[1] % told == 0 else int(key.shape[1])
        self.width = int(key.shape[-1])

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values of the first sample as (tokens, heads * width)."""
        once = tensor[0, :: tensor.shape[1] // self.heads]  # (heads, tokens, width)
        return once.transpose(0, 1).reshape(once.shape[1], -1)


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


def _attention_kernel(model: nn.Module) -> list[tuple[Any, str]]:
    """Make Hugging Face parts use scaled_dot_product_attention; gives what to put back."""
    changed: list[tuple[Any, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if kernel not in (None, "sdpa") and all(config is not c for c, _ in changed):
            changed.append((config, kernel))
            config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    return changed


def find_attention(model: nn.Module, inputs: Any) -> list[Found]:
    """Run the model once and see where attention happens.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention.
        inputs: one batch; None takes a Hugging Face model's own dummy inputs.

    Returns:
        The attention layers in the order they ran, each once.

    Raises:
        ArgumentError: no inputs to run on.
        UnsupportedError: no attention was seen.
    """
    if inputs is None:
        inputs = getattr(model, "dummy_inputs", None)
        if inputs is None:
            check.wrong_value("inputs", "one batch to run the model on, to see where its attention is", inputs)
    stack: list[nn.Module] = [model]
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _args: stack.append(m)))
        handles.append(module.register_forward_hook(lambda _m, _args, _out: stack.pop() and None, always_call=True))
    try:
        with bridge.evaluating(model), _Watch(stack) as watch:
            bridge.run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, Found] = {}
    for call in watch.calls:
        found.setdefault(id(call.module), call)
    if not found:
        raise UnsupportedError(
            "no attention was found: none of the model's parts calls torch.nn.functional.scaled_dot_product_attention. "
            "Build PrefixLayer into the model by hand (docs/delta.md)."
        )
    return list(found.values())


class Rows(nn.Module):
    """A prefix as plain parameters: keys and values (tokens, heads * width)."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key, self.value


class _Extend(TorchFunctionMode):
    """Put a prefix in front of keys and values wherever attention runs."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        call = inspect_call(args, kwargs or {})
        query, key, value, mask = call.pop("query"), call.pop("key"), call.pop("value"), call.pop("attn_mask", None)
        front = [self._heads(rows, key) for rows in getattr(self.owner, ROWS)()]
        tokens, n_query, n_key = front[0].shape[2], query.shape[2], key.shape[2]
        if call.pop("is_causal", False):
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=key.device).tril()
        if mask is not None:
            mask = F.pad(mask, (tokens, 0), value=True if mask.dtype == torch.bool else 0.0)
        return func(
            query,
            torch.cat((front[0], key), 2),
            torch.cat((front[1], value), 2),
            attn_mask=mask,
            is_causal=False,
            **call,
        )

    def _heads(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(tokens, heads * width) to (batch, heads of `like`, tokens, width)."""
        heads = rows.view(rows.shape[0], self.owner.prefix_heads, -1).transpose(0, 1).to(like.dtype)
        heads = heads.repeat_interleave(like.shape[1] // self.owner.prefix_heads, 0)
        return heads.unsqueeze(0).expand(like.shape[0], -1, -1, -1)


class Prefixed(OneAdapter, DeltaLayer):
    """An attention layer with a prefix: the same object under a subclass of its own class."""

    delta_kind = "prefix"
    prefix_heads: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Extend(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def parts(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the prefix consists of."""
        return {f"{ROWS}.{n}": p for n, p in getattr(self, ROWS).named_parameters()}

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (tokens, heads * width), as they are now."""
        return getattr(self, ROWS)()

    def revert(self) -> None:
        """Take the prefix off again, in place."""
        delattr(self, ROWS)
        del self.specs, self.prefix_heads
        self.__class__ = type(self).__bases__[1]


def put_prefix(
    model: nn.Module,
    targets: Any,
    *,
    name: str,
    dtype: Any,
    strict: bool,
    inputs: Any = None,
    prefix_token_num: Any = None,
    projection: Any = False,
    mid_dim: Any = 512,
    dropout_rate: Any = 0.0,
    text_ids: Any = None,
) -> dict[str, dict[str, Any]]:
    """Give attention layers a prefix, in place.

    Args:
        model: any model whose attention is scaled_dot_product_attention.
        targets: globs over the paths of attention layers, or None for all.
        name: the delta's name.
        dtype: of the parameters; None means float32.
        strict: whether a glob that matches no attention layer is an error.
        inputs: see `find_attention`.
        prefix_token_num: tokens of the prefix; 8 unless a text says otherwise.
        projection: whether a small network (PrefixLayer) makes the prefix, as the paper trains it.
        mid_dim: width of the network's middle.
        dropout_rate: the network's dropout.
        text_ids: token ids; the prefix starts as the keys and values that this text has in the model.

    Returns:
        Path -> options, of each layer.
    """
    check.boolean(projection, "projection")
    rate(dropout_rate, "dropout_rate")
    size(mid_dim, "mid_dim")
    if text_ids is not None:
        if projection:
            raise UnsupportedError(
                "text_ids and projection exclude each other: a network cannot be started from a text."
            )
        text_ids = [
            check.integer(i, "text_ids", minimum=0) for i in check.instance(text_ids, (list, tuple), "text_ids")
        ]
        if not text_ids or prefix_token_num not in (None, len(text_ids)):
            check.wrong_value("prefix_token_num", f"the text's {len(text_ids)} tokens", prefix_token_num)
        prefix_token_num = len(text_ids)
        inputs = {"input_ids": torch.tensor([text_ids])}
    tokens = size(8 if prefix_token_num is None else prefix_token_num, "prefix_token_num")
    kernels = _attention_kernel(model)
    try:
        found = find_attention(model, inputs)
        paths = {id(m): p for p, m in model.named_modules()}
        by_path = {paths[id(f.module)]: f for f in found}
        if targets is not None and targets != "all-linear":
            chosen = match(by_path, check.strings([targets] if isinstance(targets, str) else targets, "targets"))
            if strict:
                demand(chosen, by_path, "targets")
            if not chosen.names:
                raise PatternError(f"targets match none of the attention layers: {', '.join(by_path)}")
            by_path = {p: by_path[p] for p in chosen.names}
        taken = [p for p, f in by_path.items() if isinstance(f.module, DeltaLayer) or hasattr(f.module, ROWS)]
        if taken:
            raise UnsupportedError(f"{taken[0]} carries a delta already.")
    except BaseException:
        for config, kernel in kernels:
            config._attn_implementation = kernel
        raise
    options = {"prefix_token_num": tokens, "projection": projection, "mid_dim": mid_dim, "dropout_rate": dropout_rate}
    for f in by_path.values():
        device, kind = f.key.device, dtype or torch.float32
        width = f.heads * f.width
        rows: nn.Module
        if projection:
            rows = PrefixLayer(tokens, 1, f.heads, width, width, mid_dim, dropout_rate)
        elif text_ids is not None:
            rows = Rows(f.rows(f.key).to(kind), f.rows(f.value).to(kind))
        else:
            rows = Rows(torch.randn(tokens, width, dtype=kind), torch.randn(tokens, width, dtype=kind))
        module: Any = f.module
        module.__class__ = type(f"Prefixed{type(module).__name__}", (Prefixed, type(module)), {})
        setattr(module, ROWS, rows.to(device).train(module.training))
        module.prefix_heads = f.heads
        module.begin(dict(options), name)
    for config, kernel in kernels:
        config.attention_before_prefix = kernel
    _shift(model, tokens)
    return {p: dict(options) for p in by_path}


def _shift(model: nn.Module, tokens: int) -> None:
    """Let positions start after the prefix in causal Hugging Face models, as PEFT does."""
    for module in model.modules():
        if not getattr(module, "config", None) or not any(getattr(m, "is_causal", False) for m in module.modules()):
            continue
        if "position_ids" in inspect.signature(type(module).forward).parameters:
            module.prefix_shift = tokens
            module.register_forward_pre_hook(_shift_positions, with_kwargs=True)
            return


def _shift_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.get("position_ids")
    if positions is None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            return args, kwargs
        past = kwargs.get("past_key_values")
        start = past.get_seq_length() if past is not None else 0
        positions = torch.arange(start, start + given.shape[1], device=given.device).unsqueeze(0)
    return args, {**kwargs, "position_ids": positions + module.prefix_shift}


def forget_shift(model: nn.Module) -> None:
    """Let positions start at zero again and attention run as it did before, in place."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "attention_before_prefix"):
            config._attn_implementation = config.attention_before_prefix  # type: ignore[union-attr]
            del config.attention_before_prefix  # type: ignore[union-attr]
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _shift_positions:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
                with contextlib.suppress(AttributeError):
                    del module.prefix_shift
