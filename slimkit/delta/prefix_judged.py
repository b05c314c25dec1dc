"""Whether a prefix inside attention says what the same rows say from the model's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.core.log import logger
from slimkit.delta.positions import shift_positions
from slimkit.delta.prefix_cache import lending, self_attention

import torch
from torch import nn

__all__ = ["UNFIT", "agrees_with_cache", "bridge"]

# What a library's model raises where it cannot run as it is asked to.
UNFIT = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError, UnsupportedError)
_MASK = ((1, 1, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0))


def agrees_with_cache(model: nn.Module, decoder: Any, layers: Sequence[Any]) -> bool | None:
    """Run a decoder on a few tokens with a prefix both ways.

    Biases by distance, positions that are counted inside, kernels with more to them than a softmax: a library's own
    cache is how a model means tokens before its own, whatever its attention is made of.

    Args:
        model: with a prefix on attention layers.
        decoder: the part that takes tokens and a cache.
        layers: the attention layers with the prefix.

    Returns:
        Whether the hidden states are the same; None where this cannot be tried: the prefix is not on all layers, or
        the decoder cannot run here.
    """
    parameters = list(model.parameters())
    if not layers or any(p.is_meta for p in parameters):
        return None
    place = next(decoder.parameters()).device
    mask = torch.tensor(_MASK, device=place)
    ids = _tokens(decoder, mask.shape, place)
    length = layers[0].prefix_tokens
    kernels = {}

    # Positions are shifted where they are counted first, which may be around the decoder.
    outer = next(m for m in model.modules() if hasattr(getattr(m, "config", None), "model_type"))

    def run() -> torch.Tensor:
        seen: list[Any] = []
        handle = decoder.register_forward_hook(lambda _m, _args, out: seen.append(out))
        try:
            outer(input_ids=ids, attention_mask=mask)
        finally:
            handle.remove()
        (out,) = seen
        return (out[0] if not isinstance(out, torch.Tensor) else out)[mask.bool()].float()

    try:
        with bridge.evaluating(model):
            try:
                here = run()
            except UnsupportedError:  # attention ran elsewhere than where the prefix stands
                return False
            _act(model, layers, False)
            for module in model.modules():
                config: Any = getattr(module, "config", None)
                if hasattr(config, "attention_before_prefix"):
                    kernels[id(config)] = config, config._attn_implementation
                    config._attn_implementation = config.attention_before_prefix
            plain = run()
            found = self_attention(outer, decoder, {"input_ids": ids}, beside_encoder=False)
            modules = {id(bridge.get_module(outer, path)): at for path, (at, _) in found.items()}
            if set(modules) != set(map(id, layers)):
                return None
            rows = {
                modules[id(x)]: [x.prefix_for(r, r.new_empty(3, x.prefix_heads, 1, 1)) for r in x.keys_and_values()]
                for x in layers
            }
            with lending(decoder, _like(decoder, rows), length):
                there = run()
    except UNFIT as error:
        logger.debug("a prefix was not compared with the cache: %s", error)
        return None
    finally:
        _act(model, layers, True)
        for config, kernel in kernels.values():
            config._attn_implementation = kernel
    # float32: sums in another order; halves: their own rounding. A prefix that is meant otherwise is off by its effect.
    tolerance = 1e-3 if next(decoder.parameters()).dtype == torch.float32 else 3e-2
    return bool((here - there).abs().max() <= tolerance * (there - plain).abs().max().clamp_min(1e-6))


def _tokens(decoder: Any, shape: Sequence[int], place: Any) -> torch.Tensor:
    """Token ids that are no padding, as position counts of some models read it from them."""
    size = int(decoder.get_input_embeddings().weight.shape[0])
    usable = [i for i in range(min(size, 40)) if i != getattr(decoder.config, "pad_token_id", None)]
    flat = [usable[(7 * i + 3) % len(usable)] for i in range(shape[0] * shape[1])]
    return torch.tensor(flat, device=place).reshape(*shape)


def _like(decoder: nn.Module, rows: Any) -> Any:
    kind = next(decoder.parameters()).dtype
    return {at: tuple(t.to(kind) for t in pair) for at, pair in rows.items()}


def _act(model: nn.Module, layers: Sequence[Any], acts: bool) -> None:
    for layer in layers:
        layer.delta_acts = acts
    shift_positions(model, lambda: acts)
