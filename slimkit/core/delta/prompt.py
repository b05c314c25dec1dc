"""Virtual tokens in front of a model nobody edits: the options, and what happens to each of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slimkit.core import check
from slimkit.core.delta import opening
from slimkit.core.delta.layers import size
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.match import match

Array = np.ndarray[Any, Any]

FRONT = "mindpet_delta_prompttuning"

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


def checked(
    num_virtual_tokens: Any = None,
    init: Any = None,
    text_ids: Any = None,
    text: Any = None,
    tokenizer: Any = None,
    seed: Any = 0,
) -> PromptOptions:
    """The options of a prompt, checked.

    Args:
        num_virtual_tokens: length of the prompt; 20 unless a text says otherwise.
        init: "vocabulary" (embeddings of drawn tokens; the default) or "random" (normal).
        text_ids: token ids; the prompt starts as this text, repeated or cut to the length asked for.
        text, tokenizer: the text itself, and what turns it into tokens; see `opening.ids_of`.
        seed: of the draw.

    Example:
        >>> checked(text_ids=[5, 6]).tokens
        2
    """
    ids = opening.checked(init, text, text_ids, tokenizer)
    check.integer(seed, "seed", minimum=0)
    if num_virtual_tokens is None:
        num_virtual_tokens = 20 if ids is None else len(ids)
    return PromptOptions(size(num_virtual_tokens, "num_virtual_tokens"), init or opening.INITS[0], ids, seed)


class PromptOptions(NamedTuple):
    """The checked options of a prompt; see `checked`."""

    tokens: int
    init: str
    text_ids: list[int] | None
    seed: int

    def ids(self, rows: int) -> list[int] | None:
        """The tokens whose embeddings a prompt starts as, of a vocabulary of so many; None for random numbers.

        Raises:
            ArgumentError: the text has a token that the vocabulary lacks.
        """
        if self.text_ids is None:
            return opening.drawn(rows, self.tokens, self.seed) if self.init == "vocabulary" else None
        opening.refuse_unknown(self.text_ids, rows)
        return (self.text_ids * (self.tokens // len(self.text_ids) + 1))[: self.tokens]


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


def call_with(parameters: Sequence[inspect.Parameter], class_name: str, ids: Sequence[int]) -> Mapping[str, Array]:
    """What a model is called with to read a text alone: argument -> (1, tokens).

    A model with `input_ids` is given those; of another one the first argument is taken for the token ids, and what else
    it cannot do without grows as under a prompt (ones for a mask, places counted from zero).

    Args:
        parameters: of the model's forward or construct, self first.
        class_name: the model's class, for messages.
        ids: of the text.

    Raises:
        UnsupportedError: an argument whose name does not say what it takes.

    Example:
        >>> words = inspect.Parameter("words", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        >>> call = call_with([words.replace(name="self"), words, words.replace(name="mask")], "Net", [7, 8])
        >>> {name: value.tolist() for name, value in call.items()}
        {'words': [[7, 8]], 'mask': [[1, 1]]}
    """
    rows = np.array([ids], np.int64)
    if any(p.name == "input_ids" for p in parameters):
        return {"input_ids": rows}
    wanted = [p for i, p in enumerate(parameters) if i < 2 or p.default is p.empty]
    found = {}
    for name, (how, value) in growth(wanted, class_name).items():
        found[name] = np.arange(len(ids))[None] if how == "prompt_places" else np.full_like(rows, value)
    return {**found, wanted[1].name: rows}
