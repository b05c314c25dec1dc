"""Texts of any form as documents: rows of files, columns of data sets, conversations, rows of token numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError, ArgumentTypeError

Array = np.ndarray[Any, Any]
# A conversation: messages with a role and a content, as chat templates read them.
MESSAGES = "messages"


@dataclass(frozen=True)
class TextSource:
    """Documents of one origin.

    Args:
        name: what messages and records call it.
        documents: texts, conversations (lists of messages) or rows of token numbers.
        weight: share of the windows that it gives, beside the other sources' weights.
    """

    name: str
    documents: Sequence[Any]
    weight: float = 1.0


def documents_of(texts: Any, text_key: str = "text", name: str = "texts") -> Sequence[Any]:
    """The documents that a user's value holds.

    Args:
        texts: texts; rows of token numbers; rows as `datasets` gives them, with a text or with messages; or a map-style
            data set of Hugging Face's `datasets`.
        text_key: the key of the text in rows.
        name: for messages.

    Raises:
        ArgumentTypeError, ArgumentError: no documents, or a row without a text.

    Example:
        >>> documents_of([{"text": "one"}, {"messages": [{"role": "user", "content": "two"}]}])
        ['one', [{'role': 'user', 'content': 'two'}]]
    """
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__getitem__") or not hasattr(texts, "__len__"):
        more = "; of a streamed data set give list(data.take(n))" if hasattr(texts, "take") else ""
        raise ArgumentTypeError(
            f"{name} must be a list of texts, of conversations or of rows of token numbers, or a data set with a "
            f"length. Received: {type(texts).__name__}{more}"
        )
    if not len(texts):
        raise ArgumentError(f"{name} must hold a document. Received: none")
    columns = getattr(texts, "column_names", None)
    if columns is not None and not {text_key, MESSAGES} & set(columns):
        raise ArgumentError(
            f"{name} must have a column {text_key!r} or {MESSAGES!r}{check.near(text_key, list(columns))}. "
            f"Its columns: {list(columns)}"
        )
    return [_document(texts[at], text_key, f"{name}[{at}]") for at in range(len(texts))]


def _document(row: Any, text_key: str, name: str) -> Any:
    if isinstance(row, Mapping):
        if isinstance(row.get(text_key), str):
            return row[text_key]
        if not isinstance(row.get(MESSAGES), (list, tuple)):
            raise ArgumentError(
                f"{name} must have a text under {text_key!r}, or {MESSAGES!r}{check.near(text_key, list(row))}. "
                f"Its keys: {list(row)}"
            )
        row = row[MESSAGES]
    return row


class Encoder:
    """Documents as token numbers.

    Args:
        tokenizer: of transformers or alike; None where all documents are rows of token numbers.
        special: whether each document gets the special tokens that an encoder sees ([CLS] and [SEP]).
    """

    def __init__(self, tokenizer: Any, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        # Conversations that went through the chat template.
        self.chats = 0

    def __call__(self, document: Any, name: str) -> Array:
        """One document's tokens, (n,) int64."""
        if isinstance(document, str):
            return self._encoded(document, name, self._special)
        if isinstance(document, (list, tuple)) and document and isinstance(document[0], Mapping):
            return self._encoded(self._rendered(document, name), name, False)
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ArgumentError(
                f"{name} must be a text, a conversation or a row of token numbers. "
                f"Received: shape {ids.shape}, {ids.dtype}"
            )
        return ids.astype(np.int64)

    def _encoded(self, text: str, name: str, special: bool) -> Array:
        if self._tokenizer is None:
            raise ArgumentError(f"{name} is a text: give the tokenizer that turns it into tokens")
        # Without a bound of the tokenizer's own, which only warns: windows are cut here.
        found = self._tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        return np.asarray(found["input_ids"], np.int64).reshape(-1)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], name: str) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ArgumentError(f"{name} is a conversation, and the tokenizer has no chat template to write it with")
        self.chats += 1
        try:
            return str(self._tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
        except Exception as error:  # a template is a program, which raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ArgumentError(f"{name}: the chat template refuses the conversation: {reason}") from error
