"""Virtual tokens in front of a Hugging Face model's input, put there by a hook that nobody has to write."""

from __future__ import annotations

from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta.layers import size
from slimkit.core.delta.named import OneAdapter
from slimkit.core.errors import UnsupportedError
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.prompt import PromptTuning

import torch
from torch import nn

__all__ = ["PromptFront", "bridge", "put_prompt"]

FRONT = "mindpet_delta_prompttuning"
INITS = ("vocabulary", "random")


class PromptFront(OneAdapter, DeltaLayer, PromptTuning):
    """The virtual tokens of one model, as a child of that model."""

    delta_kind = "prompt"

    def parts(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the prompt consists of."""
        return dict(self.named_parameters())

    def revert(self) -> None:
        """Take the prompt off its model, in place."""
        (owner,) = self.__dict__["_owner"]
        for handle, hook in list(owner._forward_pre_hooks.items()):
            if hook is _prepend:
                del owner._forward_pre_hooks[handle]
                owner._forward_pre_hooks_with_kwargs.pop(handle, None)
        delattr(owner, FRONT)


def put_prompt(
    model: nn.Module,
    *,
    name: str,
    dtype: Any,
    num_virtual_tokens: Any = None,
    init: Any = "vocabulary",
    text_ids: Any = None,
) -> dict[str, dict[str, Any]]:
    """Put virtual tokens in front of a model's input, in place.

    Args:
        model: a Hugging Face model, or one that holds one.
        name: the delta's name.
        dtype: of the parameters; None means float32.
        num_virtual_tokens: length of the prompt; 20 unless a text says otherwise.
        init: "vocabulary" (embeddings of random tokens) or "random" (normal).
        text_ids: token ids; the prompt starts as this text, repeated or cut to the length asked for.

    Returns:
        Path -> options.
    """
    check.choice(init, INITS, "init")
    owner: Any = next((m for m in model.modules() if _takes_embeddings(m)), None)
    if owner is None:
        raise UnsupportedError(
            "prompt needs a model with get_input_embeddings() and a forward that takes inputs_embeds; build "
            "PromptTuning into this one by hand (docs/delta.md)."
        )
    if hasattr(owner, FRONT):
        raise UnsupportedError("the model carries a prompt already.")
    if text_ids is not None:
        text_ids = [
            check.integer(i, "text_ids", minimum=0) for i in check.instance(text_ids, (list, tuple), "text_ids")
        ]
        if not text_ids:
            check.wrong_value("text_ids", "at least one token id", text_ids)
        num_virtual_tokens = len(text_ids) if num_virtual_tokens is None else num_virtual_tokens
    tokens = size(20 if num_virtual_tokens is None else num_virtual_tokens, "num_virtual_tokens")
    table = owner.get_input_embeddings().weight
    front = PromptFront(tokens, table.shape[1])
    rows: Any = front.mindpet_delta_prompttuning_embedding.weight
    with torch.no_grad():
        if text_ids is not None:
            ids = torch.tensor((text_ids * (tokens // len(text_ids) + 1))[:tokens], device=table.device)
            rows.copy_(table[ids])
        elif init == "vocabulary":
            rows.copy_(table[torch.randint(table.shape[0], (tokens,), device=table.device)])
    front.to(device=table.device, dtype=dtype or torch.float32)
    front.begin({"num_virtual_tokens": tokens}, name)
    front.__dict__["_owner"] = (owner,)
    setattr(owner, FRONT, front)
    owner.register_forward_pre_hook(_prepend, with_kwargs=True)
    path = next(p for p, m in model.named_modules() if m is front)
    return {path: {"num_virtual_tokens": tokens}}


def _takes_embeddings(module: nn.Module) -> bool:
    import inspect

    return hasattr(module, "get_input_embeddings") and (
        "inputs_embeds" in inspect.signature(type(module).forward).parameters
    )


def _prepend(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn tokens into embeddings with the prompt in front; masks, labels and positions follow."""
    kwargs = dict(kwargs)
    ids = kwargs.pop("input_ids", None)
    if args:
        if len(args) > 1 or ids is not None:
            check.wrong_type("arguments", "keywords after input_ids while a prompt is on the model", args)
        ids = args[0]
    front = getattr(module, FRONT)
    tokens = front.num_virtual_tokens
    embeds = kwargs.get("inputs_embeds")
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    mask, labels, kinds = (kwargs.get(k) for k in ("attention_mask", "labels", "token_type_ids"))
    if mask is not None and mask.ndim == 2:
        kwargs["attention_mask"] = torch.cat((mask.new_ones(mask.shape[0], tokens), mask), 1)
    past = kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        # The prompt stands in the cache already: later steps only move behind it.
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + tokens
        return (), {**kwargs, "input_ids": None, "inputs_embeds": embeds}
    prompt = front.mindpet_delta_prompttuning_embedding.weight.to(embeds.dtype)
    prompt = prompt.unsqueeze(0).expand(embeds.shape[0], -1, -1)
    if labels is not None and labels.ndim == 2:
        kwargs["labels"] = torch.cat((labels.new_full((labels.shape[0], tokens), -100), labels), 1)
    if kinds is not None:
        kwargs["token_type_ids"] = torch.cat((kinds.new_zeros(kinds.shape[0], tokens), kinds), 1)
    kwargs.pop("position_ids", None)
    return (), {**kwargs, "input_ids": None, "inputs_embeds": torch.cat((prompt, embeds), 1)}
