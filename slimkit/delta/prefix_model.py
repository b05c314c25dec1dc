"""Prefixes for the attention layers of a model nobody edits: found by watching, extended where attention runs."""

from __future__ import annotations

import copyreg
import functools
import inspect
from dataclasses import replace
from typing import Any, ClassVar

from slimkit import bridge
from slimkit.core.delta import prefix as rules
from slimkit.core.delta.named import OneAdapter
from slimkit.core.delta.prompt import call_with
from slimkit.core.errors import SlimkitError, UnsupportedError
from slimkit.core.log import logger
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.multihead import call_layers, prefixed_multihead
from slimkit.delta.positions import counting, start_at_zero, start_behind
from slimkit.delta.prefix import PrefixLayer
from slimkit.delta.prefix_cache import decoder_of, looks_in_windows, put_cached, self_attention, text_decoder
from slimkit.delta.prefix_found import attention_kernel, find_attention, inspect_call
from slimkit.delta.prefix_judged import UNFIT, agrees_with_cache
from slimkit.delta.prompt_model import token_table
from slimkit.delta.written import Extending, also_fused, edited_class, written_attention

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Prefixed", "bridge", "forget_prefixes", "put_prefix"]

ROWS = rules.ROWS


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
        front = [self.owner.prefix_for(rows, key) for rows in self.owner.keys_and_values()]
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


class Prefixed(OneAdapter, DeltaLayer):
    """An attention layer with a prefix: the same object under a subclass of its own class."""

    delta_kind = "prefix"
    prefix_heads: int
    query_heads: int
    prefix_tokens: int
    prefix_was_read: bool  # in the run that is going on
    plain_class: ClassVar[type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self.plain_class,), dict(self.__dict__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.delta_acts:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.prefix_was_read = False
        with _Extend(self):
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not self.prefix_was_read:
            raise UnsupportedError(
                f"the attention of {self.plain_class.__name__} did not run through scaled_dot_product_attention, where "
                f"its prefix stands; on a Hugging Face model call set_attn_implementation('sdpa')."
            )
        return out

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the prefix consists of."""
        return {f"{ROWS}.{n}": p for n, p in getattr(self, ROWS).named_parameters()}

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (tokens, heads * width), as they are now."""
        self.prefix_was_read = True
        return getattr(self, ROWS)()

    def prefix_for(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(tokens, heads * width) to (batch, heads of `like`, tokens, width), in its dtype."""
        heads = rows.view(rows.shape[0], self.prefix_heads, -1).transpose(0, 1).to(like.dtype)
        heads = heads.repeat_interleave(like.shape[1] // self.prefix_heads, 0)
        return heads.unsqueeze(0).expand(like.shape[0], -1, -1, -1)

    @property
    def built_as_delta(self) -> bool:
        """Whether there is no plain layer to go back to: never, it is the same object."""
        return False

    def take_off_deltas(self) -> None:
        """Take the prefix off again, in place."""
        delattr(self, ROWS)
        del (
            self.delta_specs,
            self.active_deltas,
            self.delta_acts,
            self.prefix_heads,
            self.query_heads,
            self.prefix_tokens,
        )
        self.__dict__.pop("prefix_was_read", None)
        self.__class__ = type(self).plain_class


class PrefixedWritten(Prefixed, Extending):
    """A prefix on attention that is written out: the module's own method calls what extends it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super(Prefixed, self).forward(*args, **kwargs)  # type: ignore[misc]


def put_prefix(
    model: nn.Module, targets: Any, *, name: str, dtype: Any, strict: bool, **options: Any
) -> dict[str, dict[str, Any]]:
    """Give attention layers a prefix, in place.

    Args:
        model: any model whose attention is scaled_dot_product_attention or nn.MultiheadAttention.
        targets: globs over the paths of attention layers, or None for all.
        name: the delta's name.
        dtype: of the parameters; None means float32.
        strict: whether a glob that matches no attention layer is an error.
        options: see `slimkit.core.delta.prefix.checked`.

    Returns:
        Path -> options, of each layer.
    """
    plan = rules.checked(**options)
    plan = replace(plan, text_ids=plan.ids(lambda: int(token_table(model)[1].weight.shape[0])))
    decoder, beside_encoder = decoder_of(model), True
    if decoder is None:
        decoder, beside_encoder = text_decoder(model), False
    put = functools.partial(_in_cache, model, decoder, targets, plan, name, dtype, strict, beside_encoder)
    if decoder is not None and (beside_encoder or looks_in_windows(decoder)):
        cached = put()
        if cached is not None:
            return cached
    try:
        described, layers = _in_attention(model, targets, plan, name, dtype, strict)
    except UNFIT as error:
        # An error of ours that names an argument is the answer; others say that attention is not where it is sought.
        fits = decoder is not None and not beside_encoder
        if not fits or (isinstance(error, SlimkitError) and not isinstance(error, UnsupportedError)):
            raise
        try:
            return put() or {}
        except UNFIT:
            raise error from None
    if decoder is None or beside_encoder or agrees_with_cache(model, decoder, layers) is not False:
        return described
    for layer in layers:
        layer.take_off_deltas()
    forget_prefixes(model)
    return put() or {}


def _text(model: nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """What the model is called with to read a text alone."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())
    return {name: torch.from_numpy(a) for name, a in call_with(parameters, type(model).__name__, ids).items()}


def _in_attention(
    model: nn.Module, targets: Any, plan: rules.PrefixOptions, name: str, dtype: Any, strict: bool
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Put a prefix where attention runs, in place; path -> options, and the layers."""
    inputs = plan.inputs if plan.text_ids is None else _text(model, plan.text_ids)
    kernels = attention_kernel(model)
    try:
        seen = rules.given_sizes(plan, dict(bridge.named_modules(model))) or find_attention(model, inputs)
        seen = rules.chosen(seen, targets, strict)
        modules: dict[str, Any] = {path: bridge.get_module(model, path) for path in seen}
        rules.refuse_taken([p for p, m in modules.items() if isinstance(m, DeltaLayer) or hasattr(m, ROWS)])
        rules.refuse_replaced([p for p, m in modules.items() if "forward" in vars(m)], "forward")
        made = {path: _rows(seen[path], plan, dtype or torch.float32) for path in seen}
        classes = {path: _prefixed_class(path, module) for path, module in modules.items()}
        places = counting(model, plan.prefix_token_num, plan.counting(p for p, _ in bridge.named_modules(model)))
    except BaseException:
        for config, kernel in kernels:
            config._attn_implementation = kernel
        raise
    described = {}
    for path, module in modules.items():
        first = next(module.parameters(), None)
        module.__class__ = classes[path]
        setattr(module, ROWS, made[path].to(None if first is None else first.device).train(module.training))
        module.prefix_heads, module.query_heads = seen[path].heads, seen[path].query_heads
        module.prefix_tokens = plan.prefix_token_num
        described[path] = plan.record(seen[path], bool(places))
        module.carry_delta(described[path], name)
    for config, kernel in kernels:
        config.attention_before_prefix = kernel
    call_layers(model, modules)
    start_behind(plan.prefix_token_num, places)
    return described, list(modules.values())


def _in_cache(
    model: nn.Module, decoder: nn.Module, targets: Any, plan: rules.PrefixOptions, name: str, dtype: Any, strict: bool,
    beside_encoder: bool,
) -> dict[str, dict[str, Any]] | None:  # fmt: skip
    """Put a prefix into the cache of a decoder, in place; None where other layers of an encoder-decoder are meant."""
    inputs = plan.inputs
    if plan.text_ids is not None:
        inputs = _text(model, plan.text_ids)
        if beside_encoder:
            raise UnsupportedError("a prefix on an encoder-decoder model cannot be started from a text.")
    found = self_attention(model, decoder, inputs, beside_encoder=beside_encoder)
    kinds = {type(bridge.get_module(model, path)) for path in found}
    every = {p: rules.Seen(1, 1, 1) for p, m in bridge.named_modules(model) if type(m) in kinds}
    chosen: Any = found if targets in (None, "all-linear") else rules.chosen(every, targets, strict)
    if beside_encoder and not set(chosen) <= set(found):
        return None
    if set(chosen) != set(found):
        raise UnsupportedError(
            f"on {type(decoder).__name__} a prefix stands in the cache, before all {len(found)} attention layers or "
            f"none; apply it without targets."
        )
    layers = {path: found[path] for path in chosen}
    rules.refuse_taken([p for p in layers if isinstance(bridge.get_module(model, p), DeltaLayer)])
    made = {path: _rows(seen, plan, dtype or torch.float32) for path, (_, seen) in layers.items()}
    return put_cached(model, decoder, layers, made, plan, name, beside_encoder=beside_encoder)


def _prefixed_class(path: str, module: nn.Module) -> type:
    """The class of an attention module with a prefix, whichever way its attention is written."""
    kind: Any = type(module)
    made, unfit = _class_of(kind)
    if unfit:
        logger.warning("%s: its own softmax takes no prefix (%s); its fused attention does", path, unfit)
    return made


@functools.cache
def _class_of(kind: Any) -> tuple[type, str]:
    """The class with a prefix of attention modules of a class, and what of theirs takes none."""
    module = _empty(kind)
    bases: tuple[type, ...] = (prefixed_multihead(module, Prefixed) or Prefixed, kind)
    own: dict[str, Any] = {"plain_class": kind}
    fit, unfit = written_attention(module)
    warned = unfit.get("", "") if also_fused(kind) else ""
    if not warned and "" in fit and also_fused(kind):
        bases = (Prefixed, edited_class(kind, Extending))
    elif not warned and "" in fit:
        edited = edited_class(kind, PrefixedWritten)
        bases = edited.__bases__
        own |= {k: v for k, v in vars(edited).items() if inspect.isfunction(v)}
    return type(f"Prefixed{kind.__name__}", bases, own), warned


def _empty(kind: type) -> Any:
    module = copyreg.__newobj__(kind)  # type: ignore[attr-defined]  # typeshed leaves it out
    nn.Module.__init__(module)
    return module


def _bare(kind: type) -> Any:
    module = _empty(kind)
    module.__class__ = _class_of(kind)[0]
    return module


def _rows(seen: rules.Seen, plan: rules.PrefixOptions, kind: torch.dtype) -> nn.Module:
    width = seen.heads * seen.width
    if plan.projection:
        return PrefixLayer(plan.prefix_token_num, 1, seen.heads, width, width, plan.mid_dim, plan.dropout_rate)
    if plan.text_ids is not None:
        return Rows(seen.key.to(kind), seen.value.to(kind))
    shape = (plan.prefix_token_num, width)
    return Rows(torch.randn(shape, dtype=kind), torch.randn(shape, dtype=kind))


def forget_prefixes(model: nn.Module) -> None:
    """Let positions start at zero again and attention run as it did before, in place."""
    start_at_zero(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "attention_before_prefix"):
            config._attn_implementation = config.attention_before_prefix  # type: ignore[union-attr]
            del config.attention_before_prefix  # type: ignore[union-attr]
