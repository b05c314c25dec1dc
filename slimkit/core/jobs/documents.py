"""Documents and conversations as rows of token numbers, with what of them is learned from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.core.distill.masks import IGNORED
from slimkit.core.errors import ConfigError, FileFormatError


@dataclass(frozen=True)
class Sample:
    """A row of tokens.

    Args:
        ids: the tokens.
        learned: for each, whether it is learned from; the first one is predicted from nothing and never is.
    """

    ids: list[int]
    learned: list[bool]

    @property
    def labels(self) -> list[int]:
        """The tokens, or -100 where nothing is learned."""
        return [i if counts and at else IGNORED for at, (i, counts) in enumerate(zip(self.ids, self.learned))]


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a line holds a conversation ("messages") or a "prompt" with its "completion".

    Example:
        >>> is_chat({"prompt": "2 + 2 =", "completion": " 4"}), is_chat({"text": "four"})
        (True, False)
    """
    return "text" not in row and (isinstance(row.get("messages"), list) or {"prompt", "completion"} <= set(row))


def packed(documents: Iterable[Sequence[int]], length: int, end: int | None) -> list[Sample]:
    """Whole documents, one behind the other, in windows: nothing is cut off, and every token is read once.

    Args:
        documents: token numbers of each.
        length: tokens a window.
        end: the token between two documents, left out where a document ends with it already; None: nothing between.

    Returns:
        Windows of `length`, the last one perhaps shorter; one of a single token is left out, as nothing predicts it.

    Example:
        >>> [window.ids for window in packed([[1, 2, 3], [4, 5]], 4, end=0)]
        [[1, 2, 3, 0], [4, 5, 0]]
    """
    row: list[int] = []
    for document in documents:
        row += document
        if end is not None and document and document[-1] != end:
            row.append(end)
    windows = [row[at : at + length] for at in range(0, len(row), length)]
    return [Sample(window, [True] * len(window)) for window in windows if len(window) > 1]


def answered(row: Mapping[str, Any], tokenizer: Any, where: str) -> Sample:
    """A conversation, or a prompt with its completion: only what the assistant says is learned from.

    Args:
        row: with "messages", or with "prompt" and "completion" (texts, or lists of messages).
        tokenizer: one of transformers; conversations need its chat template.
        where: how a message calls the row.

    Raises:
        ConfigError: there is no chat template, or it does not write a conversation piece by piece.
        FileFormatError: the row is no conversation.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" not in row and isinstance(prompt, str) and isinstance(completion, str):
        first = list(tokenizer(prompt)["input_ids"])
        if first and first[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
            first.pop()
        then = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token_id is not None and then[-1:] != [tokenizer.eos_token_id]:
            then.append(tokenizer.eos_token_id)
        return Sample([*first, *then], [False] * len(first) + [True] * len(then))
    messages = row["messages"] if "messages" in row else [*_list(prompt, where), *_list(completion, where)]
    return _conversation(messages, 0 if "messages" in row else len(_list(prompt, where)), tokenizer, where)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FileFormatError(f"{where}: prompt and completion must both be texts or both lists of messages")
    return value


def _conversation(messages: Any, first: int, tokenizer: Any, where: str) -> Sample:
    """The template's text of a conversation, tokenised piece by piece, as a dialogue would be."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{where} is a conversation, and the tokenizer has no chat template: give prompt and completion"
        )
    told = all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    if not told or not any(m["role"] == "assistant" for m in messages[first:]):
        raise FileFormatError(f"{where}: messages must be objects with role and content, one at least by the assistant")
    ids: list[int] = []
    learned: list[bool] = []
    done = ""

    def add(text: str, counts: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise ConfigError(
                f"{where}: the chat template rewrites what it wrote before, so answers cannot be told apart"
            )
        new = tokenizer(text[len(done) :], add_special_tokens=False)["input_ids"]
        ids.extend(new)
        learned.extend([counts] * len(new))
        done = text

    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at >= first:
            add(_written(tokenizer, messages[:at], where, add_generation_prompt=True), False)
            add(_written(tokenizer, messages[: at + 1], where), True)
    add(_written(tokenizer, messages, where), False)
    return Sample(ids, learned)


def _written(tokenizer: Any, messages: Sequence[Any], where: str, **more: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
    except Exception as error:  # a template is a program of its author's
        raise ConfigError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from error
