"""Documents in windows, and which tokens of a conversation are learned from."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.jobs.command_options import StudentOptions
from slimkit.core.jobs.documents import answered, is_chat, packed
from slimkit.core.jobs.fields import numbers_of
from slimkit.core.jobs.sources import read_rows
from slimkit.core.jobs.tasks import task_of


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("end", [None, 0])
def test_every_token_stands_in_one_window(seed, end):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 9, rng.integers(0, 40)).tolist() for _ in range(7)]
    windows = packed(documents, 8, end)
    row = [t for d in documents for t in (d if end is None or not d else [*d, end])]
    joined = [t for w in windows for t in w.ids]
    assert joined in (row, row[:-1])  # a last window of one token predicts nothing
    assert len(row) - len(joined) == (len(row) % 8 == 1)
    assert all(len(w.ids) == 8 for w in windows[:-1])
    # the first token of a window has nothing before it; every other one is learned
    assert all(w.labels == [-100, *w.ids[1:]] for w in windows)


class Words:
    """A tokenizer of characters, with a template of the usual form."""

    eos_token_id = 0
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert not tokenize
        written = "".join(f"<{m['role'][0]}>{m['content']};" for m in messages)
        return written + ("<a>" if add_generation_prompt else "")


def said(sample):
    return "".join(chr(i) for i in sample.labels if i not in (-100, 0))


def test_only_what_the_assistant_says_is_learned():
    talk = [("system", "be"), ("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    row = {"messages": [{"role": r, "content": c} for r, c in talk]}
    found = answered(row, Words(), "sample 1")
    assert "".join(map(chr, found.ids)) == "<s>be;<u>hi;<a>yes;<u>more;<a>no;"
    assert said(found) == "yes;no;"
    # the same as a prompt with its completion, where the first answer belongs to the prompt
    parts = {"prompt": row["messages"][:4], "completion": row["messages"][4:]}
    assert answered(parts, Words(), "sample 1").ids == found.ids
    assert said(answered(parts, Words(), "sample 1")) == "no;"
    plain = answered({"prompt": "2+2=", "completion": "4"}, Words(), "sample 1")
    assert plain.ids == [1, *map(ord, "2+2=4"), 0]
    assert plain.labels == [-100] * 5 + [ord("4"), 0]


class Rewriting(Words):
    def apply_chat_template(self, messages, **more):
        return f"{len(messages)}" + super().apply_chat_template(messages, **more)


class Bare(Words):
    chat_template = None


@pytest.mark.parametrize(
    ("row", "tokenizer", "error", "words"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, Bare(), ConfigError, "no chat template"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}, Rewriting(),
         ConfigError, "rewrites"),
        ({"messages": [{"role": "user", "content": "a"}]}, Words(), FileFormatError, "assistant"),
        ({"messages": [{"role": "assistant"}]}, Words(), FileFormatError, "content"),
        ({"messages": []}, Words(), FileFormatError, "assistant"),
        ({"prompt": "a", "completion": ["b"]}, Words(), FileFormatError, "both"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(row, tokenizer, error, words):
    with pytest.raises(error, match=words):
        answered(row, tokenizer, "sample 1")


def test_conversations_are_read_where_they_are_asked_for(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": []}\n{"prompt": "a", "completion": "b"}\n{"text": "c", "messages": []}\n')
    rows = read_rows(file, chats=True)
    assert [is_chat(row) for row in rows] == [True, True, False]
    assert task_of("auto", "LlamaForCausalLM", rows) == "causal-lm"
    with pytest.raises(ConfigError, match="label"):
        task_of("classification", "LlamaForCausalLM", rows)
    with pytest.raises(FileFormatError, match="line 1"):
        read_rows(file)


def test_blocks_are_written_as_numbers_and_ranges():
    assert numbers_of("0-2, 7,5") == (0, 1, 2, 7, 5)
    assert StudentOptions(layer_map="0-2,5").blocks() == (0, 1, 2, 5)
    for odd in ("", "a", "1-", "3,3", "0-99999999999", "-1"):
        with pytest.raises(ValueError, match="block numbers"):
            StudentOptions(layer_map=odd)
