"""A prefix in the cache of a Hugging Face model's decoder, as in PEFT: its masks, windows and biases reckon with it."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import prefix as rules
from slimkit.core.delta.named import OneAdapter
from slimkit.core.errors import UnsupportedError
from slimkit.delta import library
from slimkit.delta.front_cache import cache_in, hide_front, show_front
from slimkit.delta.layer import DeltaLayer

import torch
from torch import nn

__all__ = [
    "CachedPrefix",
    "bridge",
    "decoder_of",
    "lending",
    "looks_in_windows",
    "put_cached",
    "self_attention",
    "text_decoder",
]

ROWS = rules.ROWS
LAYERS = "prefix_layers"  # on the decoder: its attention layers with a prefix
# What configurations call the reach of attention that does not see every earlier token.
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")


class CachedPrefix(OneAdapter, DeltaLayer):
    """An attention layer of a decoder with a prefix, which the decoder puts into the cache before the first token."""

    delta_kind = "prefix"
    prefix_heads: int
    prefix_tokens: int
    prefix_place: int  # of the layer in the cache

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the prefix consists of."""
        return {f"{ROWS}.{n}": p for n, p in getattr(self, ROWS).named_parameters()}

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (tokens, heads * width), as they are now."""
        return getattr(self, ROWS)()

    def in_cache(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, tokens, width) in the layer's dtype."""
        like: Any = next(p for n, p in self.named_parameters() if not n.startswith(ROWS))
        key, value = (r.view(len(r), self.prefix_heads, -1).transpose(0, 1).to(like) for r in self.keys_and_values())
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self.plain_class,), dict(self.__dict__)

    def take_off_deltas(self) -> None:
        """Take the prefix off again, in place."""
        (decoder,) = self.__dict__.pop("_decoder")
        left = tuple(layer for layer in vars(decoder)[LAYERS] if layer is not self)
        vars(decoder)[LAYERS] = left
        if not left:
            del vars(decoder)[LAYERS], vars(decoder)["prefix_beside_encoder"]
            for handle, hook in list(decoder._forward_pre_hooks.items()):
                if hook is _fill:
                    del decoder._forward_pre_hooks[handle]
                    decoder._forward_pre_hooks_with_kwargs.pop(handle, None)
            for handle, hook in list(decoder._forward_hooks.items()):
                if hook is _rest:
                    del decoder._forward_hooks[handle]
                    decoder._forward_hooks_with_kwargs.pop(handle, None)
                    decoder._forward_hooks_always_called.pop(handle, None)
        delattr(self, ROWS)
        for attribute in (
            "delta_specs",
            "active_deltas",
            "delta_acts",
            "prefix_heads",
            "prefix_tokens",
            "prefix_place",
        ):
            self.__dict__.pop(attribute, None)
        assert self.plain_class is not None
        self.__class__ = self.plain_class


@functools.cache
def _cached_class(kind: Any) -> type:
    return type(f"Prefixed{kind.__name__}", (CachedPrefix, kind), {"plain_class": kind})


def _bare(kind: Any) -> Any:
    made = _cached_class(kind)
    return copyreg.__newobj__(made)  # type: ignore[attr-defined]  # typeshed leaves it out


def decoder_of(model: nn.Module) -> Any:
    """The decoder of a Hugging Face encoder-decoder model, or of the first one that a model holds; else None."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_decoder"):
            decoder = module.get_decoder()
            if decoder is not None and decoder is not module:
                return decoder
    return None


def text_decoder(model: nn.Module) -> Any:
    """The one part of a model without an encoder that takes tokens and a cache, by Hugging Face's names; else None."""
    fit = [
        m
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "model_type")
        and library.named(m, library.CACHE)
        and "input_ids" in library.parameters(type(m))
    ]
    inner = [m for m in fit if not any(o is not m for o in m.modules() if any(o is f for f in fit))]
    return inner[0] if len(inner) == 1 else None


def looks_in_windows(decoder: nn.Module) -> bool:
    """Whether some of a decoder's attention sees only near tokens, so that it matters where a prefix stands."""
    config: Any = decoder.config
    said = [getattr(config, name, None) for name in _WINDOWS]
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return any(said) and (bool(kinds) or getattr(config, "layer_types", None) is None)


def _parted(decoder: nn.Module) -> bool:
    """Whether a decoder keeps a cache of its own tokens beside one of an encoder's."""
    return bool(vars(decoder).get("prefix_beside_encoder"))


def self_attention(
    model: nn.Module, decoder: nn.Module, inputs: Any, *, beside_encoder: bool = True
) -> dict[str, tuple[int, rules.Seen]]:
    """Run a model once and see which layers of its decoder attend to the decoder's own tokens.

    Args:
        model: the model.
        decoder: its decoder.
        inputs: one batch; None takes the model's own dummy inputs.
        beside_encoder: whether the model has an encoder as well, whose keys the cache keeps apart.

    Returns:
        Path -> place in the cache, and what was seen, of each such layer, in the order they ran.

    Raises:
        ArgumentError: no inputs to run on.
        UnsupportedError: the decoder keeps its keys in no cache that is known.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    runs = model
    if inputs is None:
        # A model that holds a library's brings no inputs; the part that does runs alone.
        brings = [
            m for m in model.modules() if getattr(m, "dummy_inputs", None) and any(o is decoder for o in m.modules())
        ]
        runs = brings[0] if brings else model
        inputs = getattr(runs, "dummy_inputs", None)
        wanted = "decoder_input_ids"
        if inputs is not None and beside_encoder and wanted in library.parameters(type(runs)):
            inputs = {wanted: inputs.get("input_ids"), **inputs}  # not every model makes them of its encoder's
    if inputs is None:
        check.wrong_value("inputs", "one batch to run the model on, to see where its attention is", inputs)
    name = library.demand(decoder, library.CACHE, "a prefix reaches the decoder")
    stack: list[nn.Module] = []
    found: dict[int, tuple[int, rules.Seen]] = {}

    class Noting(DynamicCache):
        def update(self, key: Any, value: Any, layer_idx: int, *more: Any, **options: Any) -> Any:
            heads = int(key.shape[1])
            rows = [t[0].detach().transpose(0, 1).flatten(1) for t in (key, value)]  # (tokens, heads * width)
            found[id(stack[-1])] = int(layer_idx), rules.Seen(heads, int(key.shape[-1]), heads, *rows)
            return super().update(key, value, layer_idx, *more, **options)

    def lend(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = library.given(module, args, kwargs)
        return (), {**given, name: EncoderDecoderCache(Noting(), DynamicCache()) if beside_encoder else Noting()}

    handles = [decoder.register_forward_pre_hook(lend, with_kwargs=True)]
    for module in decoder.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _args: stack.append(m)))
        handles.append(module.register_forward_hook(lambda _m, _args, _out: stack.pop() and None, always_call=True))
    try:
        with bridge.evaluating(model):
            bridge.run(runs, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UnsupportedError(f"no attention of {type(decoder).__name__} keeps its keys in the cache it was handed.")
    return {path: found[id(m)] for path, m in bridge.named_modules(model) if id(m) in found}


def put_cached(
    model: nn.Module,
    decoder: nn.Module,
    layers: Mapping[str, tuple[int, rules.Seen]],
    made: Mapping[str, nn.Module],
    plan: rules.PrefixOptions,
    name: str,
    *,
    beside_encoder: bool = True,
) -> dict[str, dict[str, Any]]:
    """Give layers of a decoder a prefix, in place.

    Args:
        model: the model.
        decoder: its decoder.
        layers: path -> place in the cache, and what was seen.
        made: path -> the rows.
        plan: the options.
        name: the delta's name.
        beside_encoder: see `self_attention`.

    Returns:
        Path -> options, of each layer.
    """
    described = {}
    for path, (place, seen) in layers.items():
        module: Any = bridge.get_module(model, path)
        device = next(module.parameters()).device
        kind: Any = type(module)
        module.__class__ = _cached_class(kind)
        setattr(module, ROWS, made[path].to(device).train(module.training))
        module.prefix_heads, module.prefix_tokens, module.prefix_place = seen.heads, plan.prefix_token_num, place
        module.__dict__["_decoder"] = (decoder,)
        described[path] = plan.record(seen, True)
        module.carry_delta(described[path], name)
    vars(decoder)[LAYERS] = tuple(bridge.get_module(model, path) for path in layers)
    vars(decoder)["prefix_beside_encoder"] = beside_encoder
    decoder.register_forward_pre_hook(_fill, with_kwargs=True)
    decoder.register_forward_hook(_rest, with_kwargs=True, always_call=True)
    return described


def _fill(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Put the prefix into the cache before the decoder's first token; masks and positions follow."""
    layers = [layer for layer in vars(decoder)[LAYERS] if layer.delta_acts]
    if not layers:
        return args, kwargs
    _refuse_checkpointing(decoder)
    given = library.given(decoder, args, kwargs)
    tokens = next(t for t in (given.get("input_ids"), given.get("inputs_embeds")) if t is not None)
    rows = {layer.prefix_place: layer.in_cache(tokens.shape[0]) for layer in layers}
    return (), _with_cache(decoder, given, rows, layers[0].prefix_tokens)


def _rest(decoder: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Between runs the prefix in the cache is no token of the text."""
    layers = [layer for layer in vars(decoder)[LAYERS] if layer.delta_acts]
    cache = cache_in(kwargs, out) if layers else None
    if cache is not None:
        hide_front(cache.self_attention_cache if _parted(decoder) else cache, layers[0].prefix_tokens)


def _refuse_checkpointing(decoder: nn.Module) -> None:
    """Refuse what takes the cache, and with it the prefix, away from the layers without a word."""
    if not (decoder.training and torch.is_grad_enabled()):
        return
    if any(vars(m).get("gradient_checkpointing") is True for m in decoder.modules()):
        raise UnsupportedError(
            f"the prefix on {type(decoder).__name__} stands in its cache, which gradient checkpointing does without "
            f"(as with PEFT); call gradient_checkpointing_disable()."
        )


def _with_cache(decoder: Any, given: dict[str, Any], rows: Mapping[int, Any], length: int) -> dict[str, Any]:
    """A decoder's arguments with keys and values (batch, heads, tokens, width) at these places of its cache."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    name, cache = library.cache_of(given)
    unasked = given.get("use_cache") is False
    beside_encoder = _parted(decoder)
    wanted = EncoderDecoderCache if beside_encoder else DynamicCache
    if cache is None or (unasked and vars(cache).get("made_for_prefix")):
        # A decoder hands back the cache it was given, wanted or not: under use_cache=False it holds for one run.
        name = library.demand(decoder, library.CACHE, "a prefix reaches the decoder")
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if beside_encoder else DynamicCache()
        cache.made_for_prefix = unasked
    if not isinstance(cache, wanted):
        raise UnsupportedError(
            f"a prefix needs a cache of kind {wanted.__name__}; the decoder was handed a {type(cache).__name__}."
        )
    own = cache.self_attention_cache if beside_encoder else cache
    show_front(own)
    if own.get_seq_length() == 0:
        for place, pair in rows.items():
            own.update(*pair, place)
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise UnsupportedError(
                "while a prefix is on the model, its decoder's mask must have shape (batch, tokens)."
            )
        given["attention_mask"] = torch.cat((mask.new_ones(mask.shape[0], length), mask), 1)
    for counted in ("cache_position", "position_ids"):
        if given.get(counted) is not None:
            given[counted] = given[counted] + length
    return {**given, str(name): cache}


@contextmanager
def lending(decoder: Any, rows: Mapping[int, Any], length: int) -> Iterator[None]:
    """Let a decoder find keys and values at these places of its cache in every run, while the context is open."""

    def lend(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (), _with_cache(module, library.given(module, args, kwargs), rows, length)

    handle = decoder.register_forward_pre_hook(lend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
