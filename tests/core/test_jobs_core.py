"""What commands read before a framework is asked: text, arrays, shapes, functions, folders; and their progress."""

from __future__ import annotations

import io
import logging
import pickle

import numpy as np
import pytest

from slimkit.core.errors import ConfigError, FileFormatError, LinkPathError
from slimkit.core.jobs import claim, folders, sources
from slimkit.core.jobs.bar import LayerBar
from slimkit.core.jobs.tasks import label_names, task_of
from slimkit.core.sparse.remaining import Progress


def test_text_comes_as_objects_strings_or_plain_lines(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a", "label": 1}\n\n"b"\n{"text": "c"}\n')
    assert sources.read_rows(lines) == [{"text": "a", "label": 1}, {"text": "b"}, {"text": "c"}]
    assert sources.read_rows(lines, limit=1) == [{"text": "a", "label": 1}]
    plain = tmp_path / "a.txt"
    plain.write_text("a\n\n  \nb c\n")
    assert sources.read_rows(plain) == [{"text": "a"}, {"text": "b c"}]
    lines.write_text('{"body": "a"}\n')
    assert sources.read_rows(lines, "body") == [{"body": "a", "text": "a"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": 3}\n', "line 2"),
        (b'{"text": "a"}\n[1]\n', "line 2"),
        (b'{"text": "a"\n', "line 1"),
        (b"[" * 100_000, "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"\n \n", "no text"),
        (b"", "no text"),
    ],
)
def test_damaged_text_is_one_error(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        sources.read_rows(tmp_path / "a.jsonl")


def test_links_and_endless_lines_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 50)
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(LinkPathError):
        sources.read_rows(tmp_path / "b.txt")
    monkeypatch.setattr(sources, "_LONGEST_LINE", 20)
    with pytest.raises(FileFormatError, match="longer than 20"):
        sources.read_rows(tmp_path / "a.txt")


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_arrays_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([Bomb()], dtype=object))
    np.savez("object.npz", a=np.array([Bomb()], dtype=object))
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Bomb()))
    buffer = io.BytesIO()
    np.save(buffer, np.arange(100))
    (tmp_path / "cut.npy").write_bytes(buffer.getvalue()[:-8])
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "named.npz").write_bytes(buffer.getvalue())
    (tmp_path / "liar.npy").write_bytes(buffer.getvalue().replace(b"(100,), ", b"(1" + b"0" * 12 + b",), ")[:200])
    for name in ("object.npy", "object.npz", "plain.npy", "cut.npy", "cut.npz", "named.npz", "liar.npy"):
        with pytest.raises(FileFormatError, match=name):
            sources.read_arrays(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_arrays_are_cut_into_batches():
    cut = sources.batches_of({"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}, 2, 100)
    assert [b["a"].tolist() for b in cut] == [[0, 1], [2, 3], [4]]
    assert cut[2]["b"].tolist() == [[8, 9]]
    for wrong in (np.float32(1).reshape(()), np.zeros((0, 2)), {"a": np.zeros(2), "b": np.zeros(3)}):
        with pytest.raises(FileFormatError):
            sources.batches_of(wrong, 2, 4)


def test_examples_from_shapes():
    named = sources.parse_example("ids=1,4:int64; x=2,3:float16")
    assert {k: (v.shape, v.dtype.name) for k, v in named.items()} == {
        "ids": ((1, 4), "int64"),
        "x": ((2, 3), "float16"),
    }
    assert set(named["ids"].ravel()) <= {0, 1}
    np.testing.assert_array_equal(sources.parse_example("2,2", seed=1), sources.parse_example("2,2", seed=1))
    for wrong in ("", "a", "0,2", "1,-2", "1.5"):
        with pytest.raises(ConfigError):
            sources.parse_example(wrong)
    with pytest.raises(ValueError, match="float32"):
        sources.parse_example("1,2:float8")


def test_functions_are_found_beside_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made_here.py").write_text("def net(width=1):\n    return ('net', width)\n")
    assert sources.ModelPlace(factory="made_here.py:net", arguments={"width": 3}).make() == ("net", 3)
    assert sources.ModelPlace(factory="made_here:net").make() == ("net", 1)
    for wrong in ("made_here", "made_here:", "made_here:nte", "nowhere_at_all:net", "made_here.py:net:x", "no.py:net"):
        with pytest.raises((ConfigError, FileFormatError)):
            sources.ModelPlace(factory=wrong).make()
    with pytest.raises(ConfigError, match="--arg"):
        sources.ModelPlace(model=tmp_path, arguments={"a": 1})


def test_data_places_know_what_they_are(tmp_path):
    for name, kind in (("a.jsonl", "text"), ("a.txt", "text"), ("a.npz", "arrays")):
        (tmp_path / name).write_text("")
        assert sources.DataPlace(str(tmp_path / name)).kind == kind
    assert sources.DataPlace("module:function").kind == "function"
    for wrong in (str(tmp_path / "a.csv"), "nothing", str(tmp_path)):
        with pytest.raises(ConfigError):
            _ = sources.DataPlace(wrong).kind


def test_a_folder_in_use_is_never_taken(tmp_path):
    mine, other = (claim.Unfinished(name, ()) for name in (".state", ".other"))
    (tmp_path / "run" / ".state").mkdir(parents=True)
    for place in ("new", "run"):
        with claim.claimed(tmp_path / place, states=(mine,)) as held:
            assert held == tmp_path / place
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for taken, states in (("run", ()), ("run", (other,)), ("file", ()), ("link", ()), (".", (mine,))):
        with pytest.raises(ConfigError, match="--out"), claim.claimed(tmp_path / taken, states=states):
            pass


def test_companions_go_along_and_weights_do_not(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in (
        "tokenizer.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "pytorch_model.bin",
    ):
        (source / name).write_text(name)
    (target / "tokenizer.json").write_text("newer")
    (source / "vocab.txt").write_text("vocab")
    assert folders.copy_companions(source, target) == ["vocab.txt"]
    assert (target / "tokenizer.json").read_text() == "newer"


def test_the_task_follows_the_data_and_the_model():
    labelled, plain = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], [{"text": "a"}]
    assert task_of("auto", "BertModel", labelled) == "classification"
    assert task_of("auto", "LlamaForCausalLM", plain) == "causal-lm"
    for task, kind, rows in (("auto", "BertModel", plain), ("classification", "BertModel", plain), ("x", "B", plain)):
        with pytest.raises(ValueError, match="--task"):
            task_of(task, kind, rows)
    assert label_names(labelled, None) == {"x": 0, "y": 1}
    assert label_names([{"label": n} for n in (10, 9, 2)], None) == {"2": 0, "9": 1, "10": 2}
    assert label_names(labelled, {"y": 0, "x": 1, "z": 2}) == {"y": 0, "x": 1, "z": 2}
    with pytest.raises(ConfigError, match="two labels"):
        label_names(labelled[:1], None)


def test_progress_lines_come_every_few_seconds_with_the_time_left(caplog):
    seconds = iter([0.0, 1.0, 6.0, 7.0])
    with caplog.at_level(logging.INFO, "slimkit"), LayerBar(5.0, lambda: next(seconds)) as bar:
        for done in (1, 2, 3):
            bar(Progress(f"block.{done}", done, 4, 2.0 * done, 90.0 - done))
    assert [r.getMessage() for r in caplog.records] == ["layers: 2 of 4, about 1 min 28 s left"]
