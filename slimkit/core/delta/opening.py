"""What the virtual tokens of a prefix or prompt begin as: a text, tokens drawn from the vocabulary, or random numbers.

Sources: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 3.2 (prompts from the
vocabulary and from text); Li & Liang 2021, "Prefix-Tuning", section 7.4 (prefixes from real words).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError
from slimkit.core.lazy import library

INITS = ("vocabulary", "random")


def checked(init: Any, text: Any, text_ids: Any, tokenizer: Any) -> list[int] | None:
    """The token ids of the text that is to begin with, or None; everything checked.

    Args:
        init: "vocabulary", "random", or None.
        text: a text, which `tokenizer` turns into tokens.
        text_ids: token ids, instead of `text`.
        tokenizer: see `ids_of`.

    Raises:
        ArgumentTypeError, ArgumentError: of the wrong type or value, or two of them exclude each other.

    Example:
        >>> checked(None, None, [5, 6], None)
        [5, 6]
    """
    if init is not None:
        check.choice(init, INITS, "init")
    refuse_several(init, text, text_ids)
    if text is not None:
        return ids_of(text, tokenizer)
    if tokenizer is not None:
        raise ArgumentError("tokenizer is for text=, which it turns into tokens; there is no text.")
    if text_ids is None:
        return None
    check.instance(text_ids, (list, tuple), "text_ids", "a list of token ids")
    ids = [int(check.integer(i, "text_ids", minimum=0)) for i in text_ids]
    if not ids:
        check.wrong_value("text_ids", "at least one token id", text_ids)
    return ids


def refuse_several(init: Any, text: Any, text_ids: Any) -> None:
    """Refuse more than one thing to begin as.

    Raises:
        ArgumentError: of these more than one is there.
    """
    given = [name for name, value in (("init", init), ("text", text), ("text_ids", text_ids)) if value is not None]
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} exclude each other: a prefix or prompt begins as one of them.")


def ids_of(text: Any, tokenizer: Any) -> list[int]:
    """A text's token ids, without the special tokens that stand around a whole input.

    Args:
        text: at least one token.
        tokenizer: of transformers or of tokenizers, or the folder that one of transformers lies in.

    Raises:
        ArgumentTypeError, ArgumentError: no text, or no tokenizer that can be used.

    Example:
        >>> class Letters:
        ...     def encode(self, text, add_special_tokens):
        ...         return [ord(letter) - 97 for letter in text]
        >>> ids_of("abc", Letters())
        [0, 1, 2]
    """
    check.text(text, "text")
    if tokenizer is None:
        raise ArgumentError("text needs the tokenizer that turns it into tokens: give tokenizer=, or text_ids=.")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = _read(Path(tokenizer))
    encode = getattr(tokenizer, "encode", None)
    if encode is None:
        check.wrong_type("tokenizer", "a tokenizer of transformers or tokenizers, or a folder with one", tokenizer)
    found = encode(text, add_special_tokens=False)
    ids = [int(i) for i in getattr(found, "ids", found)]
    if not ids:
        check.wrong_value("text", "at least one token", text)
    return ids


def _read(folder: Path) -> Any:
    if not folder.is_dir():  # a name would be looked for on the hub
        check.wrong_value("tokenizer", "an existing folder", str(folder))
    try:
        return library("transformers", "hf").AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(f"tokenizer: {folder} holds none that can be read: {reason}") from None


def refuse_unknown(ids: Sequence[int], rows: int) -> None:
    """Refuse ids that a vocabulary of so many tokens does not have.

    Raises:
        ArgumentError: there is one.
    """
    if max(ids) >= rows:
        check.wrong_value("text_ids", f"ids below {rows}, the size of the vocabulary", max(ids))


def drawn(rows: int, count: int, seed: int) -> list[int]:
    """Ids of `count` tokens drawn from a vocabulary, each at most once where it is large enough.

    Example:
        >>> sorted(drawn(3, 3, 0))
        [0, 1, 2]
    """
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.choice(rows, count, replace=count > rows)]
