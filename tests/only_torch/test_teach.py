"""Text for distill and adapt: what of it counts, and what a student is begun with."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from slimkit import get_distill_model, make_student
from slimkit.core.jobs import training
from slimkit.core.jobs.framework import FitRun
from slimkit.core.jobs.options import AdaptOptions, DistillOptions
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace
from slimkit.jobs import TorchJobs, teach
from slimkit.jobs.texts import Reader
from tests.chain import tiny_models

import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("teach")
    for family in ("llama", "bert"):
        tiny_models.hugging_face(made, family)
    tiny_models.text(made / "plain.jsonl", labels=False)
    return made


def lesson(folder, family, options, **cut):
    place, data = ModelPlace(folder / family), DataPlace(str(folder / "plain.jsonl"), max_length=16)
    return teach.lesson(TorchJobs("cpu"), place, data, options, StudentPlace({"layers": 2, **cut}), 0)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_counts_in_no_term(folder, family):
    given = lesson(folder, family, DistillOptions(hidden_weight=1.0))
    ids = torch.randint(4, 20, (1, 6), generator=torch.Generator().manual_seed(0))
    alone = {"input_ids": ids, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    padded = {name: torch.nn.functional.pad(value, (0, 10)) for name, value in alone.items()}
    dual = get_distill_model(given.teacher.model, given.student.model, given.config, alone)
    found = []
    for batch in (alone, padded):
        with torch.no_grad():
            dual(**batch)
        found.append({name: float(value) for name, value in dual.losses.items()})
    assert len(found[0]) == 3  # the answer and two blocks
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # float32 sums over other shapes
    # shares of the teacher's own size: none drowns the others
    assert all(0 <= value < 20 for value in found[0].values())


def test_a_language_model_learns_its_logits_alone(folder):
    def terms(family, **asked):
        return [
            t for at in lesson(folder, family, DistillOptions(**asked)).config.spec().soft_labels for t in at.losses
        ]

    (only,) = terms("llama")
    assert (only.func_name, only.temperature) == ("KDKLDiv", 1.0)
    assert [t.func_name for t in terms("llama", hidden_weight=0.5, temperature=3.0)] == ["KDKLDiv"] + [
        "HiddenRelative"
    ] * 2
    assert {t.func_name for t in terms("bert")} == {"HiddenRelative"}
    assert math.fsum(t.func_weight for t in terms("bert")) == pytest.approx(2.0)


def test_a_student_is_begun_with_the_blocks_that_the_text_needs(folder):
    teacher = ModelPlace(folder / "llama")
    opened = TorchJobs("cpu").open(teacher)
    batches = Reader(folder / "llama", type(opened.model), opened.model.config, 16).batches(
        [row["text"] for row in DataPlace(str(folder / "plain.jsonl")).rows()], 8
    )
    _, report = make_student(opened.model, layers=2, ffn=32, calibration=batches)
    given = lesson(folder, "llama", DistillOptions(), ffn=32)
    assert given.layers == {str(k): v for k, v in report["layers"].items()}


def reader(folder, length=16):
    opened = TorchJobs("cpu").open(ModelPlace(folder / "llama"))
    return Reader(folder / "llama", type(opened.model), opened.model.config, length)


def test_long_texts_are_read_whole(folder, caplog):
    words = " ".join(tiny_models.WORDS) * 5
    read = reader(folder)
    whole = len(read.tokenizer(words)["input_ids"])
    windows = read.windows([{"text": words}, {"text": words}])
    assert sum(len(w.ids) for w in windows) == 2 * whole
    assert all(len(w.ids) == 16 for w in windows[:-1])
    pieces = read.pieces([words])
    assert sum(len(p["input_ids"]) for p in pieces) == whole
    assert not caplog.text
    assert len(read.encode([words])[0]["input_ids"]) == 16
    assert "1 of 1 texts are longer than 16 tokens" in caplog.text


def test_labels_leave_out_prompts_padding_and_first_tokens(folder):
    read = reader(folder)
    rows = [{"prompt": "the cat", "completion": "is big"}, {"prompt": "a", "completion": "dog sat on the mat"}]
    inputs, labels = read.labelled(read.windows(rows))
    counts = (labels != -100).sum(1).tolist()
    assert counts == [2, 5]
    assert torch.equal(labels[labels != -100], inputs["input_ids"][labels != -100])
    assert int((labels[inputs["attention_mask"] == 0] != -100).sum()) == 0


def test_held_out_loss_is_per_token(folder, tmp_path):
    """Unequal lengths: the mean over tokens, whatever the batches, so that its exponential is a perplexity."""
    held = tmp_path / "held.jsonl"
    rows = [{"prompt": "the cat", "completion": "is big"}, {"prompt": "a dog", "completion": "sat on the mat " * 2}]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    face, place = TorchJobs("cpu"), ModelPlace(folder / "llama")
    options = AdaptOptions(rank=2, max_steps=1, batch_size=3, learning_rate=1e-9, targets=["*.q_proj"])
    data = DataPlace(str(held), max_length=16)
    found = training.adapt(face, place, data, tmp_path / "out", options, FitRun(), evaluation=data)["evaluation"]
    model = face.open(place).model
    read = reader(folder)
    total, count = 0.0, 0
    for sample in read.windows(rows):
        inputs, labels = read.labelled([sample])
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1]
        told = labels[0, 1:] != -100
        total += float(torch.nn.functional.cross_entropy(logits[told], labels[0, 1:][told], reduction="sum"))
        count += int(told.sum())
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)  # float32
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


# Asking a teacher once. -----------------------------------------------------------------------------------------------


def distilled(folder, out, caplog, *, restart=False, **asked):
    """Loss by epoch, and what the log says of the teacher."""
    import logging

    cut = StudentPlace({"layers": 2}, teacher=asked.pop("teacher", "auto"))
    options = DistillOptions(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, **asked})
    data = DataPlace(str(folder / "plain.jsonl"), max_length=16)
    caplog.clear()
    with caplog.at_level(logging.INFO, "slimkit"):
        found = training.distill(
            TorchJobs("cpu"), ModelPlace(folder / "llama"), data, out, options, cut, FitRun(restart=restart)
        )
    return found, " ".join(r.message for r in caplog.records if r.message.startswith("the teacher runs"))


def test_a_teacher_is_asked_once_where_that_is_cheaper(folder, tmp_path, caplog):
    cached, said = distilled(folder, tmp_path / "a", caplog)
    assert cached["teacher"] == "cached"
    assert "runs once" in said
    online, said = distilled(folder, tmp_path / "b", caplog, teacher="online")
    assert (online["teacher"], "as asked for" in said) == ("online", True)
    # fewer classes than are kept: the same float32 numbers, read back
    assert cached["loss_by_epoch"] == pytest.approx(online["loss_by_epoch"], rel=1e-5)
    assert not list((tmp_path / "a").rglob("*shard-*"))
    for more, words in (({"epochs": 1}, "seen 1 times"), ({"hidden_weight": 1.0}, "hidden states")):
        found, said = distilled(folder, tmp_path / f"c{len(more)}{words[:4]}", caplog, **more)
        assert found["teacher"] == "online"
        assert words in said


def test_a_run_goes_on_with_the_answers_that_it_kept(folder, tmp_path, caplog, monkeypatch):
    whole, _ = distilled(folder, tmp_path / "whole", caplog)
    from slimkit.core.jobs import work

    def stopped(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "distill", stopped)
        with pytest.raises(KeyboardInterrupt):
            distilled(folder, tmp_path / "a", caplog)
    kept = [f.name for f in (tmp_path / "a" / ".slimkit-train" / "teacher").iterdir()]
    assert "cache.json" in kept
    # a full disk would now speak against it; what was begun goes on
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    found, said = distilled(folder, tmp_path / "a", caplog)
    assert "runs once" in said
    assert found["loss_by_epoch"] == whole["loss_by_epoch"]
    online, said = distilled(folder, tmp_path / "b", caplog)
    assert online["teacher"] == "online"
    assert "that are free" in said
