"""Virtual tokens in front of a model nobody edits: the options, and what happens to each of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.delta.layers import size
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.match import match

FRONT = "mindpet_delta_prompttuning"
INITS = ("vocabulary", "random")

# How the table of the tokens is usually called, where a model has several embeddings.
_TOKEN_TABLES = (
    "word_embeddings",
    "embed_tokens",
    "tok_embeddings",
    "token_embedding",
    "wte",
    "words",
    "word",
    "embed",
)
# A word in an input's name -> how it grows: the method, and what stands in front.
_INPUTS = (
    ("position", "prompt_places", 0),
    ("mask", "prompt_fill", 1),
    ("label", "prompt_fill", -100),
    ("type", "prompt_fill", 0),
    ("segment", "prompt_fill", 0),
    ("ids", "prompt_fill", 0),
    ("token", "prompt_fill", 0),
)


def checked(num_virtual_tokens: Any, init: Any, text_ids: Any) -> tuple[int, list[int] | None]:
    """The number of virtual tokens (20 unless a text says otherwise) and the text's ids, checked.

    Example:
        >>> checked(None, "vocabulary", [5, 6])
        (2, [5, 6])
    """
    check.choice(init, INITS, "init")
    if text_ids is not None:
        check.instance(text_ids, (list, tuple), "text_ids", "a list of token ids")
        text_ids = [int(check.integer(i, "text_ids", minimum=0)) for i in text_ids]
        if not text_ids:
            check.wrong_value("text_ids", "at least one token id", text_ids)
        num_virtual_tokens = len(text_ids) if num_virtual_tokens is None else num_virtual_tokens
    return size(20 if num_virtual_tokens is None else num_virtual_tokens, "num_virtual_tokens"), text_ids


def refuse_taken(taken: bool) -> None:
    """Refuse a second prompt on the same model."""
    if taken:
        raise ArgumentError("the model carries a prompt already; remove_delta takes it off.")


def embedding_path(tables: Mapping[str, int], targets: Any = None) -> str:
    """The embedding of the tokens among a model's embeddings: by name, or the only one.

    Args:
        tables: path -> number of rows.
        targets: a glob over the paths that names it, or None.

    Raises:
        UnsupportedError: there is none, or none that is surely the one.

    Example:
        >>> embedding_path({"words": 40, "places": 16})
        'words'
    """
    if targets is not None:
        own = [targets] if isinstance(targets, str) else check.strings(targets, "targets")
        # A record names the prompt below the embedding, or (torch's) below the model itself.
        own = [t.removesuffix(FRONT).removesuffix(".") for t in own]
        named = match(tables, [t for t in own if t]).names if any(own) else []
        if len(named) == 1:
            return str(named[0])
        if any(own):
            check.wrong_value("targets", f"the one token embedding among {', '.join(tables) or 'none'}", targets)
    by_name = [p for word in _TOKEN_TABLES for p in tables if p.rpartition(".")[2].lower() == word]
    found = by_name or (list(tables) if len(tables) == 1 else [])
    if not found:
        raise UnsupportedError(
            f"prompt needs the embedding of the tokens, named by targets=[...]. "
            f"The model's embeddings: {', '.join(tables) or 'none'}."
        )
    return found[0]


def growth(parameters: Sequence[inspect.Parameter], class_name: str) -> dict[str, tuple[str, int]]:
    """How each input of a model grows by a prompt: (method, value in front), by the input's name.

    The first input is taken for the token ids; the others are known by a word in their names: mask (ones in front),
    type, segment, ids, token (zeros), label (-100) and position (which begins behind the prompt).

    Args:
        parameters: of the model's forward or construct, self first.
        class_name: the model's class, for messages.

    Raises:
        UnsupportedError: an input whose name does not say how it grows.

    Example:
        >>> plain = inspect.Parameter("ids", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        >>> growth([plain.replace(name="self"), plain, plain.replace(name="attention_mask")], "Net")
        {'ids': ('prompt_fill', 0), 'attention_mask': ('prompt_fill', 1)}
    """
    grows: dict[str, tuple[str, int]] = {}
    for parameter in parameters[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UnsupportedError(f"prompt needs a model with plain arguments; {class_name} takes {parameter}.")
        word = parameter.name.lower() if grows else "ids"
        how = next((h for h in _INPUTS if h[0] in word), None)
        if how is None:
            raise UnsupportedError(
                f"prompt cannot know how the input {parameter.name!r} of {class_name} grows: a name with "
                f"{', '.join(word for word, _, _ in _INPUTS)} in it says so."
            )
        grows[parameter.name] = how[1:]
    return grows


def fronted_source(parameters: Sequence[inspect.Parameter], class_name: str) -> str:
    """The source of a construct that lengthens its inputs by the prompt and calls the model's own.

    It calls ``prompt_fill(input, value)``, ``prompt_places(input, value)`` and ``construct_without_prompt(...)`` of
    the object; arguments and errors are those of `growth`.

    Example:
        >>> ids = inspect.Parameter("ids", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        >>> print(fronted_source([ids.replace(name="self"), ids], "Net"))
        class Net:
            def construct(self, ids):
                return self.construct_without_prompt(self.prompt_fill(ids, 0))
    """
    passed = [f"self.{how}({name}, {value})" for name, (how, value) in growth(parameters, class_name).items()]
    signature = [p.name if p.default is p.empty else f"{p.name}=None" for p in parameters[1:]]
    return (
        f"class {class_name}:\n"
        f"    def construct({', '.join(['self', *signature])}):\n"
        f"        return self.construct_without_prompt({', '.join(passed)})"
    )
