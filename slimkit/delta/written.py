"""Attention written as two matrix products around a softmax: its own method, edited to take a prefix in front."""

from __future__ import annotations

import inspect
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.core.source.attention_method import edited_method, softmax_method

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Extending", "Watched", "also_fused", "bridge", "edited_class", "written_attention"]


class Extending:
    """What the edited source of an attention module calls, over the rows that the module holds."""

    def prefix_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values (tokens, heads * width) of the prefix; None while it does not act."""
        holder: Any = self
        return holder.keys_and_values() if holder.delta_acts else None

    def prefix_keys(self, keys: torch.Tensor, transposed: bool, rows: Any) -> torch.Tensor:
        """Keys with the prefix in front: (..., width, tokens), or (..., tokens, width) where `transposed`."""
        if rows is None:
            return keys
        if transposed:
            return torch.cat((self._front(rows[0], keys), keys), -2)
        return torch.cat((self._front(rows[0], keys.transpose(-1, -2)).transpose(-1, -2), keys), -1)

    def prefix_values(self, values: torch.Tensor, rows: Any) -> torch.Tensor:
        """Values (..., tokens, width) with the prefix in front."""
        if rows is None:
            return values
        return torch.cat((self._front(rows[1], values), values), -2)

    def prefix_mask(self, mask: Any, neutral: Any) -> Any:
        """A mask over the keys, wider by columns that change nothing; numbers and what broadcasts pass as they are."""
        if not isinstance(mask, torch.Tensor) or mask.ndim == 0 or mask.shape[-1] == 1:
            return mask
        holder: Any = self
        if not holder.delta_acts:
            return mask
        return F.pad(mask, (holder.prefix_tokens, 0), value=neutral)

    def _front(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(tokens, heads * width) as the leading axes of `like` (..., tokens, width) want it, in its dtype."""
        holder: Any = self
        heads = holder.prefix_heads
        front = rows.view(rows.shape[0], heads, -1).transpose(0, 1).to(like.dtype)  # (heads, tokens, width)
        if like.ndim == 2:
            return front[0]
        wanted = like.shape[1] if like.ndim == 4 else holder.query_heads
        front = front.repeat_interleave(wanted // heads, 0)
        if like.ndim == 4:
            return front.unsqueeze(0).expand(like.shape[0], -1, -1, -1)
        return front.repeat(like.shape[0] // wanted, 1, 1)


class Watched(Extending):
    """Notes the keys and values (..., tokens, width) that an attention module multiplies, and changes nothing."""

    def prefix_rows(self) -> Any:
        return None, None

    def prefix_keys(self, keys: torch.Tensor, transposed: bool, rows: Any) -> torch.Tensor:
        self.__dict__["seen_keys"] = (keys if transposed else keys.transpose(-1, -2)).detach()
        return keys

    def prefix_values(self, values: torch.Tensor, rows: Any) -> torch.Tensor:
        self.__dict__["seen_values"] = values.detach()
        return values

    def prefix_mask(self, mask: Any, neutral: Any) -> Any:
        return mask


def edited_class(kind: type, extending: type) -> type:
    """A subclass of a module's class whose attention takes its keys and values from the methods of `extending`.

    Raises:
        NoAttentionError: the source holds no attention that can be extended; the message says what is missing.
    """
    name, method = edited_method(kind, "torch")
    return type(kind.__name__, (extending, kind), {name: method})


def also_fused(kind: type) -> bool:
    """Whether the method that calls a softmax can run scaled_dot_product_attention instead."""
    found = softmax_method(kind, "torch")
    return found is not None and "scaled_dot_product_attention" in inspect.getsource(found[1])


def written_attention(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Modules by path whose attention is written out, and what looks like one but cannot be extended, with why."""
    fit: dict[str, nn.Module] = {}
    unfit: dict[str, str] = {}
    for path, module in bridge.named_modules(model):
        if softmax_method(type(module), "torch") is None:
            continue
        try:
            edited_class(type(module), Watched)
        except UnsupportedError as error:
            unfit[path] = str(error)
        else:
            fit[path] = module
    return fit, unfit
