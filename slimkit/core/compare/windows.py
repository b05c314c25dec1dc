"""Text as fixed windows of tokens, by a protocol that is stored with every result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ArgumentError


@dataclass(frozen=True)
class Window:
    """A piece of one document.

    Args:
        document: number of the document it is cut from.
        ids: its tokens, (length,) int64; the first one is not predicted.
        starts: the byte at which each token begins in the text, and where the last one ends, (length + 1,); a token in
            front that stands for no text has no bytes. None when only tokens are known.
    """

    document: int
    ids: np.ndarray[Any, Any]
    starts: tuple[int, ...] | None = None

    def n_bytes(self, read: int) -> int | None:
        """UTF-8 bytes of the text behind the first `read` tokens; None when only tokens are known."""
        return None if self.starts is None else self.starts[-1] - self.starts[read]


@dataclass(frozen=True)
class Protocol:
    """How text becomes windows; printed and stored with the result, since perplexities under two protocols differ.

    Args:
        length: tokens a window, and the stride from one to the next.
        bos: whether every window begins with the tokenizer's beginning-of-sequence token.

    Example:
        >>> Protocol(512).sentence()
        'windows of 512 tokens, stride 512, documents never joined, no special tokens, first token not predicted'
    """

    length: int
    bos: bool = False

    def sentence(self) -> str:
        """The protocol in one line."""
        special = "each begins with BOS" if self.bos else "no special tokens"
        return (
            f"windows of {self.length} tokens, stride {self.length}, documents never joined, {special}, "
            "first token not predicted"
        )


def cut(documents: Iterable[Any], protocol: Protocol, tokenizer: Any = None) -> list[Window]:
    """Cut documents into windows; what is left at a document's end counts from two tokens on.

    Args:
        documents: texts, or sequences of token numbers.
        protocol: length and special tokens.
        tokenizer: turns a text into ``input_ids`` as those of transformers do; needed for texts alone.

    Returns:
        The windows in the order of the documents.

    Raises:
        ArgumentError: no document gives a window, or a text comes without a tokenizer.

    Example:
        >>> [w.ids.tolist() for w in cut([[1, 2, 3, 4, 5], [6], [7, 8]], Protocol(3))]
        [[1, 2, 3], [4, 5], [7, 8]]
    """
    check.integer(protocol.length, "length", 2)
    first = []
    if protocol.bos:
        if getattr(tokenizer, "bos_token_id", None) is None:
            raise ArgumentError("bos=True needs a tokenizer that has a beginning-of-sequence token")
        first = [int(tokenizer.bos_token_id)]
    step = protocol.length - len(first)
    found = []
    for number, document in enumerate(documents):
        ids, starts = _tokens(document, number, tokenizer)
        for begin in range(0, len(ids), step):
            part = [*first, *ids[begin : begin + step]]
            if len(part) < 2:
                continue
            told = None
            if starts is not None:
                told = (*(starts[begin] for _ in first), *starts[begin : min(begin + step, len(ids)) + 1])
            found.append(Window(number, np.asarray(part, np.int64), told))
    if not found:
        raise ArgumentError("dataset must hold a document of two tokens or more. Received: none")
    return found


def _tokens(document: Any, number: int, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """A document's tokens, and for texts the byte at which each begins, with the number of all bytes at the end."""
    if not isinstance(document, str):
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ArgumentError(
                f"dataset[{number}] must be a text or a row of token numbers. Received: shape {ids.shape}, {ids.dtype}"
            )
        return [int(i) for i in ids], None
    if tokenizer is None:
        raise ArgumentError(f"dataset[{number}] is a text: give the tokenizer that turns it into tokens")
    if not getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(document, add_special_tokens=False)
        return [int(i) for i in encoded["input_ids"]], None
    encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    return [int(i) for i in encoded["input_ids"]], _starts(document, encoded["offset_mapping"])


def _starts(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    # Tokens of one character share its beginning; sums over a window still give its bytes.
    at = np.concatenate([[0], np.cumsum([len(c.encode("utf-8", "surrogatepass")) for c in text])]).astype(int)
    return [*(int(at[start]) for start, _ in offsets), int(at[-1])]
