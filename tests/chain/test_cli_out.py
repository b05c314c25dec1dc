"""Where results go: nothing of the user's is replaced unasked, a failure leaves nothing, success leaves the result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core import files
from slimkit.core.errors import SlimkitError
from slimkit.core.jobs import claim, fitting
from tests.chain import tiny_models
from tests.conftest import INSTALLED

TORCH = pytest.mark.skipif("torch" not in INSTALLED, reason="PyTorch's side")
MINDSPORE = pytest.mark.skipif("mindspore" not in INSTALLED, reason="MindSpore's side")

ON_TORCH = ("--factory", "one.py:net")
ON_MINDSPORE = ("-f", "mindspore", "--factory", "two.py:net")
SMALL = ("--student-arg", "width=8", "--match", "fc1=fc1", "--data", "x.npz")


def rows(net):
    """Command -> its arguments, --out and its place left off, and whether the result is a file."""
    return [
        (("prune", *net, "--keep-ratio", 0.5, "--alignment", 1, "--un-prune", 1, "--example", "2,6"), False),
        (("sparsify", *net, "--method", "magnitude"), False),
        (("adapt", *net, "--data", "labelled.npz", "--rank", 2, "--max-steps", 1), False),
        (("distill", *net, *SMALL, "--hidden-weight", 0, "--max-steps", 1), False),
        (("export", *net, "--example", "2,6"), True),
        (("compress", *net, "--tuned", "tuned.safetensors"), False),
    ]


WRITING = [
    *(pytest.param(*row, marks=TORCH, id=f"torch-{row[0][0]}") for row in rows(ON_TORCH)),
    *(pytest.param(*row, marks=MINDSPORE, id=f"mindspore-{row[0][0]}") for row in rows(ON_MINDSPORE)[1:3]),
    pytest.param(("sparsify", "-m", "llama", "--method", "magnitude"), False, marks=TORCH, id="torch-blocks"),
    pytest.param(("export", "-m", "sparse", "--format", "w16a16s"), False, marks=TORCH, id="torch-w16a16s"),
    pytest.param(("convert", "w.safetensors"), True, id="convert"),
    pytest.param(("schema",), True, id="schema"),
]


def called(arguments, place):
    where = [place] if arguments[0] == "convert" else ["-o", place]
    return CliRunner().invoke(app, [str(a) for a in (*arguments, *where)])


def refused(arguments, place):
    done = called(arguments, place)
    assert isinstance(done.exception, SlimkitError), done.exception
    return str(done.exception)


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    (folder / "one.py").write_text(tiny_models.TORCH_PLAIN)
    (folder / "two.py").write_text(tiny_models.MS_PLAIN)
    x = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "labelled.npz", x=x, labels=x[:, :3].argmax(1))
    files.write_tensors(folder / "w.safetensors", {"bn.weight": np.ones(2, np.float32)})
    shapes = {"fc1.weight": (16, 6), "fc1.bias": 16, "fc2.weight": (3, 16), "fc2.bias": 3}
    shapes |= dict.fromkeys(("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"), 16)
    tuned = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    files.write_tensors(folder / "tuned.safetensors", tuned | {"norm.num_batches_tracked": np.zeros((), np.int64)})
    if "torch" in INSTALLED:
        tiny_models.hugging_face(folder, "llama", num_hidden_layers=2)
    return folder


@pytest.fixture(autouse=True)
def _inside(here, monkeypatch):
    monkeypatch.chdir(here)


@pytest.mark.parametrize(("arguments", "is_file"), WRITING)
def test_what_is_there_stays_until_force_replaces_it_by_a_whole_result(here, tmp_path, arguments, is_file):
    if "sparse" in arguments and not (here / "sparse").exists():
        assert called(("sparsify", "-m", "llama", "--method", "magnitude"), here / "sparse").exit_code == 0
    place = tmp_path / ("out.onnx" if arguments[0] == "export" else "out.ckpt" if arguments[0] == "convert" else "out")
    if is_file:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    before = names(tmp_path)
    assert "--force" in refused(arguments, place)
    if not is_file:
        # Not every folder: one with a model in it.
        assert "and no other" in refused((*arguments, "--force"), place)
        files.write_json(place / "config.json", {"model_type": "old"})
        before = names(tmp_path)
        assert "model, a delta or a run" not in refused(arguments, place)
    assert names(tmp_path) == before
    forced = called((*arguments, "--force"), place)
    assert forced.exit_code == 0, forced.exception
    fresh = place.with_name(f"fresh{place.suffix}")
    assert called(arguments, fresh).exit_code == 0
    if is_file:
        assert place.stat().st_size == fresh.stat().st_size > len("mine")
    else:
        assert names(place) == names(fresh)
    hidden = [name for name in names(tmp_path) if any(part.startswith(".") for part in Path(name).parts)]
    assert hidden == []


def broken(*_args, **_more):
    raise OSError(28, "No space left on device", "disk")


@pytest.mark.parametrize(("arguments", "is_file"), WRITING)
def test_a_command_that_fails_leaves_nothing_and_force_loses_nothing(here, tmp_path, monkeypatch, arguments, is_file):
    if "sparse" in arguments and not (here / "sparse").exists():
        assert called(("sparsify", "-m", "llama", "--method", "magnitude"), here / "sparse").exit_code == 0
    monkeypatch.setattr("os.fsync", broken)  # nothing reaches the disk
    ending = ".onnx" if arguments[0] == "export" else ".ckpt" if arguments[0] == "convert" else ""
    done = called(arguments, tmp_path / "new" / "deep" / f"out{ending}")
    assert isinstance(done.exception, OSError), done.exception
    assert names(tmp_path) == []
    old = tmp_path / f"old{ending}"
    if is_file:
        old.write_text("mine")
    else:
        old.mkdir()
        Path(old / "config.json").write_text("{}")
    before = names(tmp_path)
    assert isinstance(called((*arguments, "--force"), old).exception, OSError)
    assert names(tmp_path) == before


@TORCH
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("sparsify", "-m", "llama", "--method", "magnitude", "--pattern", "3:7"), "7"),
        (("sparsify", "-m", "llama", "--method", "magnitude", "--target", "nothing*"), "nothing"),
        (("adapt", *ON_TORCH, "--data", "labelled.npz", "--target", "nothing*"), "nothing"),
        (("distill", *ON_TORCH, "--data", "x.npz", "--student-arg", "width=8", "--match", "fc9=fc1"), "fc9"),
    ],
)
def test_a_wrong_option_leaves_the_place_free_for_the_right_one(here, tmp_path, arguments, word):
    assert word in refused(arguments, tmp_path / "out")
    assert names(tmp_path) == []


@TORCH
def test_a_run_that_fails_at_once_leaves_nothing_and_a_filled_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(tiny_models.TORCH_PLAIN + "\n\ndef bad():\n    raise ValueError('no data today')\n")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nmodel: m.py:net\ndata: m.py:bad\nstages:\n  - prune: {reserved_ratio: 0.5}\n"
    )
    assert "no data today" in refused(("run", "r.yaml"), "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "--force" in refused(("run", "r.yaml"), "full")
    assert names(tmp_path / "full") == ["mine.txt"]


@TORCH
def test_what_took_time_stays_where_a_command_fails_and_is_gone_on_from(here, tmp_path, monkeypatch):
    train = ("adapt", *ON_TORCH, "--data", "labelled.npz", "--rank", 2, "--batch-size", 4, "--save-every", 1)

    class Full:
        def on_step_end(self, trainer):
            if trainer.global_step == 3:
                broken()

    monkeypatch.setattr(fitting, "ProgressBar", Full)
    assert isinstance(called(train, tmp_path / "out").exception, OSError)
    assert names(tmp_path / "out")[0] == ".slimkit-train"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert called((*train, "--json"), tmp_path / "out").exit_code == 0
    assert called((*train, "--json"), tmp_path / "whole").exit_code == 0
    assert names(tmp_path / "out") == names(tmp_path / "whole")


def test_force_never_replaces_what_is_read_or_worked_in(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    files.write_json(model / "config.json", {})
    with (
        pytest.raises(SlimkitError, match="holds what the command reads"),
        claim.claimed(tmp_path, force=True, reads=(model,)),
    ):
        pass
    monkeypatch.chdir(model)
    with pytest.raises(SlimkitError, match="and no other"), claim.claimed(Path(), force=True):
        pass
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(SlimkitError, match="symbolic link"), claim.claimed(tmp_path / "link", force=True):
        pass
    assert json.loads((model / "config.json").read_text()) == {}


@TORCH
def test_a_run_whose_stage_falls_short_says_so_and_ends_with_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "\n\ndef data():\n    return {'train': batches(), 'example': inputs()[0]}\n"
    (tmp_path / "m.py").write_text(tiny_models.TORCH_PLAIN + data)
    for floor, code in ((0.9, 1), (0.1, 0)):
        stage = f"prune: {{reserved_ratio: 0.4, node_reserved_ratio: {floor}, importance: l1, un_prune_list: []}}"
        (tmp_path / "r.yaml").write_text(
            "version: 1\nname: r\nmodel: {factory: m.py:net, arguments: {width: 128}}\ndata: m.py:data\n"
            f"stages:\n  - {stage}\n"
        )
        done = called(("run", "r.yaml"), f"out-{floor}")
        assert done.exit_code == code, done.output
        assert ("Not reached: 01-prune: parameters kept" in done.stdout) == bool(code)
        assert (tmp_path / f"out-{floor}" / "report.html").exists()
