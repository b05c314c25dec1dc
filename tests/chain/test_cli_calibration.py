"""`--calib` of the commands: several sources, text of the model's own, and the record that keeps judges apart."""

from __future__ import annotations

import json
import random

import pytest

from slimkit.core.calibration.record import read_record
from slimkit.core.errors import ArgumentError, ConfigError
from tests.chain import tiny_models
from tests.chain.test_cli_commands import refused, run
from tests.conftest import INSTALLED

pytestmark = pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders are PyTorch's")


def write_text(file, seed, n=30):
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(tiny_models.WORDS, k=40))} for _ in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_models.hugging_face(tmp_path, "llama")
    for seed, name in enumerate(("a", "b", "held")):
        write_text(tmp_path / f"{name}.jsonl", seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sparse(out, *calib, samples=9):
    given = [part for one in calib for part in ("--calib", one)]
    more = ("--samples", samples, "--max-length", 24, "--json")
    return run("sparsify", "--model", "llama", "--method", "wanda", *given, "--out", out, *more)


def test_sources_are_mixed_by_weight_and_recorded_and_kept_from_judging(here):
    sparse("half", "a.jsonl=2", "b.jsonl=1")
    (step,) = read_record(here / "half")
    assert [(s["name"], s["windows"]) for s in step["sources"]] == [("a.jsonl", 6), ("b.jsonl", 3)]
    found = run("compare", "llama", "half", "--text", "held.jsonl", "--no-speed", "--length", 24, "--json")
    assert found["data"]["calibrated on"][0]["sha256"] == step["sha256"]
    error = refused("compare", "llama", "half", "--text", "a.jsonl", "--no-speed", "--length", 24)
    assert isinstance(error, ArgumentError)
    assert "half: 6 of 9 calibration windows stand in the held-out text" in str(error)


def test_the_record_goes_along_through_later_steps(here):
    run("prune", "--model", "llama", "--keep-ratio", "0.8", "--importance", "activation", "--calib", "a.jsonl",
        "--samples", 4, "--out", "pruned", "--alignment", 8)  # fmt: skip
    run("sparsify", "--model", "pruned", "--method", "wanda", "--calib", "b.jsonl", "--samples", 4, "--out", "both")
    assert [s["command"] for s in read_record(here / "both")] == ["prune", "sparsify"]


def test_self_is_text_that_the_model_writes_and_is_kept_beside_the_folder(here):
    first = sparse("own", "self", samples=4)
    (step,) = read_record(here / "own")
    assert step["own text"]["rows"] == 4
    assert (here / "own.self.jsonl").exists()
    written = (here / "own.self.jsonl").read_bytes()
    (here / "again.self.jsonl").write_bytes(written)
    assert sparse("again", "self", samples=4)["layers"] == first["layers"]
    mixed = sparse("mixed", "a.jsonl", "self", samples=4)
    assert mixed["zeros"] == first["zeros"]
    assert [s["name"] for s in read_record(here / "mixed")[0]["sources"]] == ["a.jsonl", "self"]


@pytest.mark.parametrize(
    ("calib", "match"),
    [
        (("a.jsonl=0",), "above 0"),
        (("a.jsonl=x",), "above 0"),
        (("a.jsonl", "x.npy"), "x.npy"),
        (("a.jsonl", "nets:batches"), "several sources only of text"),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(here, calib, match):
    given = [part for one in calib for part in ("--calib", one)]
    error = refused("sparsify", "--model", "llama", "--method", "wanda", *given, "--out", "x")
    assert isinstance(error, ConfigError)
    assert match in str(error)


def test_an_encoder_writes_no_text(tmp_path, monkeypatch):
    tiny_models.hugging_face(tmp_path, "bert")
    monkeypatch.chdir(tmp_path)
    error = refused("sparsify", "--model", "bert", "--method", "wanda", "--calib", "self", "--out", "x")
    assert "causal language model" in str(error)
