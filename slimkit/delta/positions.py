"""Positions that start behind a prefix, as Hugging Face models count them behind cached keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.delta import positions as rules
from slimkit.core.errors import ArgumentError
from slimkit.delta import library

import torch
from torch import nn

Hook = Callable[..., Any]


def counting(model: nn.Module, tokens: int, paths: Sequence[str] | None) -> list[tuple[nn.Module, Hook]]:
    """The modules that are given position numbers, each with the hook that shifts them; nothing is changed.

    Args:
        model: the model.
        tokens: of the prefix.
        paths: of the modules whose whole-number inputs are positions; None finds them in Hugging Face models and
            nowhere else.

    Raises:
        ArgumentError: positions start behind another prefix already.
    """
    found = list(_places(model, paths))
    for module, _ in found:
        there = getattr(module, "prefix_shift", tokens)
        if there != tokens:
            raise ArgumentError(f"positions start behind a prefix of {there} tokens already; this one has {tokens}.")
    return found


def start_behind(tokens: int, places: Sequence[tuple[Any, Hook]]) -> None:
    """Let positions start after a prefix, in place, where `counting` found them."""
    for module, hook in places:
        if all(h is not hook for h in module._forward_pre_hooks.values()):
            module.prefix_shift = tokens
            module.prefix_acts = True
            module.register_forward_pre_hook(hook, with_kwargs=True)


def shift_positions(model: nn.Module, acts: Callable[[], bool]) -> None:
    """Let positions start behind the prefix that `start_behind` noted, or at zero while it does not act, in place."""
    shifted = [module for module in model.modules() if "prefix_shift" in vars(module)]
    if shifted:  # only then is it worth a walk to know whether it acts
        now = acts()
        for module in shifted:
            vars(module)["prefix_acts"] = now


def _shift(module: Any) -> int:
    return int(module.prefix_shift) if module.prefix_acts else 0


def _places(model: nn.Module, paths: Sequence[str] | None) -> Iterator[tuple[Any, Hook]]:
    """The modules to hook, each with its hook."""
    if paths is not None:
        yield from ((bridge.get_module(model, path), _shift_whole_numbers) for path in paths)
        return
    counting = [m for m in model.modules() if _counts_past(m)]
    if counting:
        yield from ((m, _shift_past) for m in counting)
        return
    for module in model.modules():
        if not getattr(module, "config", None) or "position_ids" not in library.parameters(type(module)):
            continue
        causal = any(getattr(m, "is_causal", False) for m in module.modules())
        if causal or library.named(module, library.CACHE):
            yield module, _shift_positions
            return


def _counts_past(module: nn.Module) -> bool:
    """Whether these are BERT's embeddings or their like, which count positions from the length of the cache.

    Raises:
        UnsupportedError: they look like it, and are handed that length under a name that is not known.
    """
    takes = library.parameters(type(module))
    if hasattr(module, "config") or not {"input_ids", "token_type_ids", "position_ids"} <= set(takes):
        return False
    if "inputs_embeds" not in takes:
        return False
    library.demand(module, library.CACHED_TOKENS, "it counts positions behind cached keys")
    return True


def is_counted_by_library(model: nn.Module) -> bool:
    """Whether this is a Hugging Face model, or holds one, whose way of counting positions is known."""
    return any(hasattr(getattr(m, "config", None), "model_type") for m in model.modules())


def _shift_whole_numbers(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    found = False

    def moved(given: Any) -> Any:
        nonlocal found
        if not isinstance(given, torch.Tensor) or given.is_floating_point() or given.dtype == torch.bool:
            return given
        found = True
        return given + _shift(module)

    out = tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}
    if not found:
        raise rules.NoPositionsError(rules.no_positions(type(module).__name__))
    return out


def _shift_past(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    if bound.arguments.get("position_ids") is not None:
        bound.arguments["position_ids"] = bound.arguments["position_ids"] + _shift(module)
    else:
        name = library.demand(module, library.CACHED_TOKENS, "it counts positions behind cached keys")
        bound.arguments[name] = bound.arguments.get(name, 0) + _shift(module)
    return bound.args[1:], bound.kwargs


def _shift_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not _shift(module):
        return args, kwargs  # the library counts, which some models do by their mask
    given = library.given(module, args, kwargs)
    positions = given.get("position_ids")
    if positions is None:
        tokens = next((given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
        if tokens is None:
            return args, kwargs
        start = library.cached_tokens(given)
        mask = given.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and _counts_mask(module):
            counted = torch.cumsum(mask.long(), 1) * mask.long() - 1
            positions = torch.where(counted < 0, counted, counted + _shift(module))
            return (), {**given, "position_ids": positions[:, start:]}
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).unsqueeze(0)
    return (), {**given, "position_ids": positions + _shift(module)}


def _counts_mask(module: nn.Module) -> bool:
    """Whether positions count the tokens that the mask lets through: OPT's and BioGPT's tables are given the mask."""
    return any(
        isinstance(m, nn.Embedding) and {"attention_mask", "position_ids"} <= set(library.parameters(type(m)))
        for m in module.modules()
    )


_HOOKS = (_shift_whole_numbers, _shift_past, _shift_positions)


def start_at_zero(model: nn.Module) -> None:
    """Let positions start at zero again, in place."""
    for module in model.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if any(hook is own for own in _HOOKS):
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
                module.__dict__.pop("prefix_shift", None)
                module.__dict__.pop("prefix_acts", None)
