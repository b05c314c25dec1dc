"""Calibration sets: what is drawn, how it is packed or padded, and when held-out text is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.calibration.apart import MOST, STRETCH, refuse_seen, seen
from slimkit.core.calibration.drawing import shares
from slimkit.core.calibration.own import ROWS, OwnTextOptions, sampled, write_own_text
from slimkit.core.calibration.record import read_record, records_of, write_record
from slimkit.core.calibration.sets import calibration_set, encoded
from slimkit.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileFormatError,
    MissingFrameworkError,
)
from slimkit.core.jobs.sources import read_documents


class Letters:
    """A tokenizer of characters, with the special tokens that are asked for."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, bos=None, cls=None, template=None):
        self.bos_token_id, self.cls_token_id, self.chat_template = bos, cls, template

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [ord(c) for c in text]
        if add_special_tokens and self.cls_token_id is not None:
            ids = [self.cls_token_id, *ids, 3]
        if add_special_tokens and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        return {"input_ids": ids}

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def drawn(texts, tokenizer=None, n=4, length=8, seed=0, **more):
    return calibration_set(texts, tokenizer or Letters(), n, length, seed, lambda array: array, **more)


def texts_of(windows):
    return ["".join(chr(i) if i > 31 else "|" for i in w) for w in windows]


def test_windows_come_from_the_whole_file_and_not_its_head():
    documents = [f"{at:04d}" * 4 for at in range(1000)]
    found = drawn(documents, n=200, length=8)
    numbers = np.array([int(t[:4].strip("|") or 0) for t in texts_of(found.windows)])
    thirds = np.bincount(np.minimum(numbers // 334, 2), minlength=3)
    assert thirds.min() > 40, thirds  # 67 each are expected, of 200
    assert found.record["sources"][0]["drawn from"] == 200  # one piece a document before a second of any


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_token_is_drawn_twice_and_the_seed_says_which(seed):
    document = np.random.default_rng(3).permutation(100).tolist()
    found = drawn([document], n=20, length=9, seed=seed)
    ids = np.concatenate(found.windows)
    assert len(found.windows) == 100 // 9
    assert len(set(ids.tolist())) == len(ids)
    for window in found.windows:  # a window is a stretch of the document
        at = document.index(window[0])
        assert document[at : at + 9] == window.tolist()
    again = drawn([document], n=20, length=9, seed=seed)
    assert again.record["sha256"] == found.record["sha256"]
    assert drawn([document], n=20, length=9, seed=seed + 1).record["sha256"] != found.record["sha256"]


def test_short_documents_are_packed_whole_and_an_end_stands_behind_each(caplog):
    found = drawn(["abc", "def", "ghi", "jkl"], n=2, length=8)
    text = "".join(texts_of(found.windows))
    assert sorted(text.rstrip("|").split("|")) == ["abc", "def", "ghi", "jkl"]
    assert found.record["packed"] is True
    assert all(len(w) == 8 for w in found.windows)


def test_an_encoders_documents_are_padded_one_by_one_with_masks():
    found = drawn(["abc", "defgh"], Letters(cls=2), n=2, length=8, batch_size=2)
    (batch,) = found
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == (2, 7)  # the longest: [CLS] d e f g h [SEP]
    assert sorted(mask.sum(1).tolist()) == [5, 7]
    assert (ids[mask == 0] == 0).all()
    assert (ids[:, 0] == 2).all()


def test_windows_begin_as_the_tokenizer_begins_a_text():
    for bos, first in ((7, 7), (None, None)):
        found = drawn(["abcdefgh" * 9], Letters(bos=bos), n=3, length=5)
        assert {int(w[0]) for w in found.windows if first is not None} <= {7}
        assert all(len(w) == 5 and (w[1:] > 7).all() for w in found.windows)


def test_what_is_said_names_packing_padding_and_too_few_windows(caplog):
    with caplog.at_level("INFO", logger="slimkit"):
        found = drawn(["abc"], n=3, length=8)
        drawn(["abc"], Letters(cls=2), n=1, length=8)
    said = caplog.text
    assert "short documents packed, 50.0 % padding" in said
    assert "short documents padded, with masks" in said
    assert "hold 1 windows of 8 tokens, not the 3 asked for" in said
    assert len(found.windows) == 1


def test_conversations_go_through_the_chat_template():
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}, {"text": "plain"}]
    found = drawn(rows, Letters(template="x"), n=2, length=32)
    text = "".join(texts_of(found.windows))
    assert "<user>hi<bot>yo|" in text
    assert "plain|" in text
    assert found.record["sources"][0]["conversations"] == 1
    with pytest.raises(ArgumentError, match="no chat template"):
        drawn(rows, Letters())


@pytest.mark.parametrize(
    ("weights", "n", "expected"), [([1], 5, [5]), ([2, 1], 9, [6, 3]), ([1, 1, 1], 8, [3, 3, 2]), ([99, 1], 3, [2, 1])]
)
def test_sources_share_the_windows_by_weight(weights, n, expected):
    assert sorted(shares(weights, n), reverse=True) == expected
    letters = "abc"
    sources = [[letters[i] * 40] * 10 for i in range(len(weights))]
    found = drawn(sources, n=n, length=8, weights=weights)
    counts = [sum(t.startswith(letters[i]) for t in texts_of(found.windows)) for i in range(len(weights))]
    assert counts == [s["windows"] for s in found.record["sources"]]
    assert sum(counts) == n


class Columns:
    """As much of a data set of `datasets` as is read."""

    def __init__(self, rows):
        self._rows, self.column_names = rows, list(rows[0])

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, at):
        return self._rows[at]


class Streamed:
    def take(self, n):
        return self

    def __iter__(self):
        return iter(())


def test_forms_of_data_give_the_same_windows(tmp_path):
    texts = [f"text number {i} of some" for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    forms = {
        "texts": texts,
        "rows": [{"text": t} for t in texts],
        "data set": Columns([{"text": t, "n": 1} for t in texts]),
        "jsonl": str(tmp_path / "a.jsonl"),
        "txt": tmp_path / "a.txt",
    }
    digests = {name: drawn(form, n=5).record["sha256"] for name, form in forms.items()}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        ([], ArgumentError, "must hold a document"),
        (["a"], ArgumentError, "two tokens"),
        (Streamed(), ArgumentTypeError, "take"),
        (Columns([{"txt": "a"}]), ArgumentError, "Did you mean"),
        ([{"txt": "a"}], ArgumentError, r"texts\[0\]"),
        ([[1.5]], ArgumentError, "row of token numbers"),
        (7, ArgumentTypeError, "list of texts"),
        ("nothing.jsonl", FileFormatError, "nothing.jsonl"),
    ],
)
def test_what_is_no_text_is_refused(texts, error, match):
    with pytest.raises(error, match=match):
        drawn(texts)


def test_parquet_is_read_with_pyarrow_or_says_what_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 no table")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(MissingFrameworkError, match=r"slimkit\[parquet\]"):
            read_documents(file)
        return
    with pytest.raises(FileFormatError, match=r"readable \.parquet"):
        read_documents(file)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), file)
    assert read_documents(file) == ["one", "two"]


# Calibration and evaluation ------------------------------------------------------------------------------------------


@pytest.fixture
def words():
    return np.random.default_rng(0).integers(0, 5000, (40, 400))


@pytest.mark.parametrize("length", [16, 64, 200])
@pytest.mark.parametrize("shift", [0, 1, 9])
def test_windows_are_found_however_held_out_text_is_cut(words, length, shift):
    prints = drawn(list(words[:20]), n=20, length=length).record["stretches"]
    parts = [d[at : at + 300] for d in words[:20] for at in (0, 300 - length - shift)]
    assert len(seen(prints, parts)) >= 18  # a window across both cuts may escape
    assert seen(prints, list(words[20:])) == []


TOKENIZERS = {"none": {}, "begins": {"bos": 1}, "around": {"cls": 2}}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("length", [32, 64, 128])
@pytest.mark.parametrize("size", [3, 9, 15, 16, 20, 40, 100, 300])
def test_mixing_is_found_at_every_length_of_document_and_window(size, length, tokenizer):
    letters = Letters(**TOKENIZERS[tokenizer])
    letters.all_special_ids = [0, 1, 2, 3]
    chance = np.random.default_rng(size)
    texts = ["".join(map(chr, chance.integers(1000, 9000, size))) for _ in range(400)]
    found = drawn(texts[:200], letters, n=12, length=length)
    held = encoded(texts[:200], letters)
    whole = [len(w) >= STRETCH or size < STRETCH for w in found.windows]
    assert len(seen(found.record["stretches"], held)) >= sum(whole) - 1  # one of cut pieces alone may escape
    assert seen(found.record["stretches"], encoded(texts[200:], letters)) == []
    with pytest.raises(ArgumentError, match="stand in the held-out text"):
        drawn(texts[:200], letters, n=12, length=length, held_out=texts[:200])


def test_windows_too_short_to_be_looked_for_are_counted(words, caplog):
    found = drawn(list(words[:5]), n=6, length=STRETCH - 1)
    assert refuse_seen(found.record, list(words[:5]), "x") == 0
    assert "6 of 6 calibration windows hold no 16 tokens of a document" in caplog.text


def test_mixing_is_refused_and_shared_boilerplate_is_not(words, caplog):
    licence = words[39][:100]
    documents = [np.concatenate([licence, d]) if at % 7 == 0 else d for at, d in enumerate(words[:39])]
    found = drawn(documents[:20], n=100, length=64)
    assert 0 < refuse_seen(found.record, documents[20:], "x") <= MOST * 100
    assert "stand in the held-out text" in caplog.text
    with pytest.raises(ArgumentError, match="100 of 100 calibration windows stand in the held-out text"):
        refuse_seen(found.record, documents, "x")
    one = [documents[1]]
    with pytest.raises(ArgumentError, match="stand in the held-out text"):
        refuse_seen(found.record, one, "x")  # few of the windows, and much of what judges
    with pytest.raises(ArgumentError, match="held_out"):
        drawn(documents[:20], n=20, length=64, held_out=documents[5:8])


def test_a_record_goes_on_from_the_folder_before_and_says_when_it_is_damaged(tmp_path, words):
    first, second = (drawn(list(words[i : i + 5]), n=3, length=32).record for i in (0, 5))
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write_record(tmp_path / "a", "prune", first)
    write_record(tmp_path / "b", "sparsify", second, tmp_path / "a")
    steps = read_record(tmp_path / "b")
    assert [s["command"] for s in steps] == ["prune", "sparsify"]
    assert [s["sha256"] for s in steps] == [first["sha256"], second["sha256"]]
    write_record(tmp_path / "c", "prune", None)
    assert read_record(tmp_path / "c") == []
    assert records_of([first, [second]]) == [first, second]
    for wrong in ("{}", '{"format": "slimkit-calibration", "version": 1, "steps": [{}]}', "no JSON"):
        (tmp_path / "c" / "calibration.json").write_text(wrong)
        with pytest.raises(FileFormatError):
            read_record(tmp_path / "c")


# Text of the model's own ----------------------------------------------------------------------------------------------


class Chain:
    """A model in which each token's logits are those of a table's row."""

    def __init__(self):
        self.table, self.calls = np.random.default_rng(5).standard_normal((11, 11)) * 3, 0

    def __call__(self, ids, state):
        self.calls += 1
        return self.table[ids[:, -1]], None


def write(options, file=None, model=None):
    return write_own_text(model or Chain(), options, {"w": np.zeros(2)}, file)


def test_tokens_follow_the_models_distribution():
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]] * 20000))
    found = np.bincount(sampled(logits, np.random.default_rng(0).random(20000)), minlength=4) / 20000
    assert np.abs(found - [0.1, 0.2, 0.3, 0.4]).max() < 0.02  # five standard errors of 20,000 draws
    with pytest.raises(ArgumentError, match="finite"):
        sampled(np.array([[np.nan, 0.0]]), np.array([0.5]))


def test_own_text_goes_on_after_a_kill_to_the_same_bytes(tmp_path):
    options = OwnTextOptions(3 * ROWS, 12, 0, 4)
    whole = write(options, tmp_path / "whole.jsonl")
    written = (tmp_path / "whole.jsonl").read_bytes()
    for cut in (len(written) // 2, len(written) - 3, len(written) // 3):
        torn = tmp_path / f"torn{cut}.jsonl"
        torn.write_bytes(written[:cut])
        again = write(options, torn)
        assert torn.read_bytes() == written
        assert again.record == whole.record
    model = Chain()
    write(options, tmp_path / "whole.jsonl", model)
    assert model.calls == 0  # it stands there already
    fewer = write(OwnTextOptions(5, 12, 0, 4), tmp_path / "whole.jsonl")
    assert all((a == b).all() for a, b in zip(fewer.rows, whole.rows))


def test_own_text_of_another_run_is_refused(tmp_path):
    file = tmp_path / "own.jsonl"
    write(OwnTextOptions(2, 6, 0, 4), file)
    for other in (OwnTextOptions(2, 6, 1, 4), OwnTextOptions(2, 7, 0, 4), OwnTextOptions(2, 6, 0, 5)):
        with pytest.raises(ArgumentError, match="another run"):
            write(other, file)
    file.write_text('{"text": "not ours"}\n')
    with pytest.raises(FileFormatError, match="wrote itself"):
        write(OwnTextOptions(2, 6, 0, 4), file)
    with pytest.raises(ArgumentError, match="start is needed"):
        OwnTextOptions(2, 6, 0, None)
