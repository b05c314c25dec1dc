"""`slimkit distill --student FOLDER`: a Hugging Face teacher and a student that was pruned or made sparse before."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from tests.chain import tiny_models
from tests.conftest import INSTALLED

pytestmark = pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders")


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments):
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, text, and the teacher pruned and made sparse."""
    home = tmp_path_factory.mktemp("students")
    tiny_models.hugging_face(home, "llama", num_hidden_layers=2)
    tiny_models.text(home / "t.jsonl", labels=False)
    how = ("--importance", "l1", "--keep-ratio", 0.8, "--alignment", 8)
    run("prune", "-m", home / "llama", *how, "-o", home / "pruned")
    run("sparsify", "-m", home / "llama", "--method", "magnitude", "--pattern", "2:4", "-o", home / "sparse")
    return home


def teach(home, *more):
    data = ("--data", home / "t.jsonl", "--max-length", 16, "--batch-size", 4)
    return ("distill", "-m", home / "llama", *data, "--epochs", 2, "--learning-rate", 0.01, *more)


@pytest.mark.parametrize("teacher", ["online", "cached"])
def test_a_pruned_folder_learns_from_its_dense_teacher(home, tmp_path, teacher):
    import transformers

    asked = teach(home, "--student", home / "pruned", "--teacher", teacher, "-o", tmp_path / "d")
    done = run(*asked)
    assert done["parameters"] < done["teacher_parameters"]
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    assert done["teacher"] == teacher
    assert done["layers"] == {"0": 0, "1": 1}
    small, taught = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (home / "pruned", tmp_path / "d"))
    assert taught.config.intermediate_size == small.config.intermediate_size
    assert any((a != b).any() for a, b in zip(small.parameters(), taught.parameters()))
    transformers.AutoTokenizer.from_pretrained(tmp_path / "d")
    card = (tmp_path / "d" / "README.md").read_text()
    assert "--student pruned" in card
    assert f"--teacher {teacher}" in card


def test_a_sparse_student_keeps_its_zeros(home, tmp_path):
    from safetensors.numpy import load_file

    done = run(*teach(home, "--student", home / "sparse", "-o", tmp_path / "d"))
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    before, after = (load_file(f / "model.safetensors") for f in (home / "sparse", tmp_path / "d"))
    report = json.loads((tmp_path / "d" / "sparse_report.json").read_text())
    for name in (f"{layer}.weight" for layer in report["layers"]):
        assert ((before[name] == 0) == (after[name] == 0)).all(), name
        assert (before[name] != after[name]).any()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "give --student FOLDER, such as the pruned teacher, or at least one of --layers"),
        (("--student", "pruned", "--layers", 1), "--student is a model that is small already"),
        (("--student", "pruned", "--selection", "first"), "--student is a model that is small already"),
        (("--student", "shorter", "--hidden-weight", 1.0), "must have as many blocks where layers are compared"),
        (("--student", "other"), "must have the teacher's vocabulary"),
        (("--student", "pruned", "--student-arg", "a=1"), "--student-arg is for the function of"),
    ],
)
def test_a_student_that_cannot_be_is_refused(home, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(home)
    for name, sizes in (("shorter", {"num_hidden_layers": 1}), ("other", {"vocab_size": 40})):
        if name in more and not (home / name).exists():
            tiny_models.hugging_face(tmp_path, "llama", **sizes).rename(home / name)
    done = call(*teach(home, *more, "-o", tmp_path / "d"))
    assert words in str(done.exception)
    assert not (tmp_path / "d").exists()


def test_a_shorter_student_learns_the_answers_alone(home, tmp_path):
    short = tiny_models.hugging_face(tmp_path, "llama", num_hidden_layers=1)
    done = run(*teach(home, "--student", short, "-o", tmp_path / "d"))
    assert done["layers"] == {}
    assert len(done["terms"]) == 1


def test_calibration_data_that_nothing_reads_is_told(home, tmp_path, caplog):
    prune = ("prune", "-m", home / "llama", "--keep-ratio", 0.8, "--alignment", 8, "--importance", "l1", "-o")
    text = ("--calib", home / "t.jsonl", "--samples", 4)
    for stream in ("--whole", "--stream"):
        run(*prune, tmp_path / stream.strip("-"), *text, stream)
        assert "--calib is read by nothing here" in caplog.text
        caplog.clear()
    run(*prune, tmp_path / "refitted", *text, "--compensate")
    assert "--calib is read by nothing" not in caplog.text
