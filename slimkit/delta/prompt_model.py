"""Virtual tokens in front of the input of a model nobody edits: Hugging Face's, or one that takes token ids."""

from __future__ import annotations

import inspect
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.delta import prompt as rules
from slimkit.core.delta.named import OneAdapter
from slimkit.core.errors import UnsupportedError
from slimkit.delta import library
from slimkit.delta.front_cache import cache_in, hide_front, show_front
from slimkit.delta.layer import DeltaLayer
from slimkit.delta.prompt import PromptTuning

import torch
from torch import nn

__all__ = ["PromptFront", "bridge", "put_prompt"]

FRONT = rules.FRONT


class PromptFront(OneAdapter, DeltaLayer, PromptTuning):
    """The virtual tokens of one model, as a child of that model."""

    delta_kind = "prompt"

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, torch.Tensor]:
        """Path below the layer -> tensor of everything the prompt consists of."""
        return dict(self.named_parameters())

    @property
    def built_as_delta(self) -> bool:
        """Whether there is nothing to go back to: never, it stands beside the model."""
        return False

    def take_off_deltas(self) -> None:
        """Take the prompt off its model, in place."""
        owner, *hooked = self.__dict__["_owner"]
        for module in (owner, *hooked):
            for handle, hook in list(module._forward_pre_hooks.items()):
                if hook in (_prepend, _lengthen, _lengthen_memory):
                    del module._forward_pre_hooks[handle]
                    module._forward_pre_hooks_with_kwargs.pop(handle, None)
            for handle, hook in list(module._forward_hooks.items()):
                if hook in (_answer, _rest):
                    del module._forward_hooks[handle]
                    module._forward_hooks_with_kwargs.pop(handle, None)
                    module._forward_hooks_always_called.pop(handle, None)
            module.__dict__.pop("prompt_front", None)
        delattr(owner, FRONT)


def _takes_embeddings(module: nn.Module) -> bool:
    return hasattr(module, "get_input_embeddings") and "inputs_embeds" in library.parameters(type(module))


def token_table(model: nn.Module, targets: Any = None) -> tuple[Any, Any]:
    """The Hugging Face model that this is or holds, or None; and the embedding of the tokens.

    Args:
        model: the model.
        targets: names the embedding of a model that is not Hugging Face's.
    """
    owner: Any = next((m for m in model.modules() if _takes_embeddings(m)), None)
    if owner is not None:
        return owner, owner.get_input_embeddings()
    tables: dict[str, Any] = {p: m for p, m in bridge.named_modules(model) if isinstance(m, nn.Embedding)}
    return None, tables[rules.embedding_path({p: m.num_embeddings for p, m in tables.items()}, targets)]


def put_prompt(model: nn.Module, targets: Any, *, name: str, dtype: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """Put virtual tokens in front of a model's input, in place.

    Args:
        model: a Hugging Face model, one that holds one, or any model whose first input is token ids.
        targets: the token embedding of a model that is not Hugging Face's, where its name does not say it.
        name: the delta's name.
        dtype: of the parameters; None means float32.
        options: see `slimkit.core.delta.prompt.checked`.

    Returns:
        Path -> options.
    """
    plan = rules.checked(**options)
    tokens = plan.tokens
    rules.refuse_taken(any(isinstance(m, PromptFront) for m in model.modules()))
    owner, embedding = token_table(model, targets)
    if owner is None:
        grows = rules.growth(list(inspect.signature(type(model).forward).parameters.values()), type(model).__name__)
    elif targets is not None and not all(t.endswith(FRONT) for t in targets):
        check.wrong_value("targets", "None for prompt on a Hugging Face model", targets)
    table = embedding.weight
    ids = plan.ids(table.shape[0])
    front = PromptFront(tokens, table.shape[1])
    if ids is not None:
        with torch.no_grad():
            front.mindpet_delta_prompttuning_embedding.weight.copy_(table[torch.tensor(ids, device=table.device)])
    front.to(device=table.device, dtype=dtype or torch.float32)
    front.carry_delta({"num_virtual_tokens": tokens}, name)
    if owner is not None:
        hooked = _hooks(owner)
        for module, hook in hooked:
            module.__dict__["prompt_front"] = (front,)
            module.register_forward_pre_hook(hook, with_kwargs=True)
            if hook is _prepend:
                module.register_forward_hook(_rest, with_kwargs=True, always_call=True)
        front.__dict__["_owner"] = (owner, *(module for module, _ in hooked if module is not owner))
    else:
        owner = model
        front.__dict__["grows"] = grows
        embedding.__dict__["prompt_front"] = (front,)
        owner.register_forward_pre_hook(_lengthen, with_kwargs=True)
        embedding.register_forward_hook(_answer)
        front.__dict__["_owner"] = (owner, embedding)
    setattr(owner, FRONT, front)
    path = next(p for p, m in bridge.named_modules(model) if m is front)
    return {path: {"num_virtual_tokens": tokens}}


def _hooks(owner: Any) -> list[tuple[Any, Any]]:
    """The parts of a Hugging Face model that a prompt is hooked to, each with the hook.

    Raises:
        UnsupportedError: the model keeps earlier tokens under a name that is not known.
    """
    if getattr(getattr(owner, "config", None), "is_encoder_decoder", False):
        # generate() calls the encoder by itself, so the model as a whole is no place for it.
        encoder, decoder = owner.get_encoder(), owner.get_decoder()
        if encoder is not None and encoder is not owner and _takes_embeddings(encoder):
            return [(encoder, _prepend), (decoder, _lengthen_memory)]
    if "use_cache" in library.parameters(type(owner)) or library.named(owner, library.CACHE):
        library.demand(owner, library.CACHE, "a prompt knows whether it was read already")
    return [(owner, _prepend)]


def _lengthen(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make room for the prompt in every input of a model that is not Hugging Face's."""
    front = getattr(module, FRONT)
    if not front.delta_acts:
        return args, kwargs
    tokens, grows = front.num_virtual_tokens, front.__dict__["grows"]
    given = {**dict(zip(grows, args)), **kwargs}
    for name, value in given.items():
        how, filler = grows.get(name, ("", 0))
        if value is None or not how:
            continue
        if value.ndim != 2:
            check.wrong_value(name, "of shape (batch, tokens) while a prompt is on the model", tuple(value.shape))
        if how == "prompt_places":
            places = torch.arange(tokens, dtype=value.dtype, device=value.device).expand(value.shape[0], -1)
            given[name] = torch.cat((places, value + tokens), 1)
        else:
            given[name] = torch.cat((value.new_full((value.shape[0], tokens), filler), value), 1)
    return (), given


def _answer(module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
    """The embedded tokens with the prompt in the room made for it."""
    (front,) = module.__dict__["prompt_front"]
    if not front.delta_acts:
        return out
    rows = front.mindpet_delta_prompttuning_embedding.weight.to(out.dtype)
    return torch.cat((rows.expand(out.shape[0], -1, -1), out[:, rows.shape[0] :]), 1)


def _front_of(module: Any) -> PromptFront:
    """The prompt of a Hugging Face model, asked of the part that a hook is on."""
    (front,) = vars(module)["prompt_front"]
    return front


def _longer(mask: Any, tokens: int) -> Any:
    """A mask (batch, tokens) with ones in front of every virtual token."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise UnsupportedError("while a prompt is on the model, its attention mask must have shape (batch, tokens).")
    return torch.cat((mask.new_ones(mask.shape[0], tokens), mask), 1)


def _prepend(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn tokens into embeddings with the prompt in front; masks, labels and positions follow."""
    front = _front_of(module)
    if not front.delta_acts:
        return args, kwargs
    given = library.given(module, args, kwargs)
    tokens, ids, embeds = front.num_virtual_tokens, given.pop("input_ids", None), given.get("inputs_embeds")
    if ids is None and embeds is None:
        return args, kwargs
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    show_front(library.cache_of(given)[1])
    given = {**given, "input_ids": None, "inputs_embeds": embeds}
    if given.get("attention_mask") is not None:
        given["attention_mask"] = _longer(given["attention_mask"], tokens)
    for name in ("position_ids", "cache_position"):
        given.pop(name, None)  # the model counts from the prompt's first token, in every step alike
    if library.cached_tokens(given) > 0:
        return (), given  # the prompt stands in the cache already
    prompt = front.mindpet_delta_prompttuning_embedding.weight.to(embeds.dtype)
    prompt = prompt.unsqueeze(0).expand(embeds.shape[0], -1, -1)
    labels, kinds = given.get("labels"), given.get("token_type_ids")
    if labels is not None and labels.ndim == 2:
        given["labels"] = torch.cat((labels.new_full((labels.shape[0], tokens), -100), labels), 1)
    if kinds is not None:
        given["token_type_ids"] = torch.cat((kinds.new_zeros(kinds.shape[0], tokens), kinds), 1)
    return (), {**given, "inputs_embeds": torch.cat((prompt, embeds), 1)}


def _rest(module: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Between runs the prompt in the cache is no token of the text."""
    front = _front_of(module)
    if front.delta_acts:
        hide_front(cache_in(kwargs, out), front.num_virtual_tokens)


def _lengthen_memory(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let a decoder see the prompt in front of what the encoder read: its mask is as long as the encoder's output."""
    front = _front_of(module)
    if not front.delta_acts:
        return args, kwargs
    given = library.given(module, args, kwargs)
    mask, memory = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
    if mask is not None and memory is not None and mask.shape[-1] != memory.shape[1]:
        given["encoder_attention_mask"] = _longer(mask, front.num_virtual_tokens)
    return (), given
