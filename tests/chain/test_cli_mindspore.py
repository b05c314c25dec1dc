"""The commands on MindSpore cells: a checkpoint and a factory in, a folder or file out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.errors import ConfigError
from tests.chain import tiny_models
from tests.conftest import INSTALLED

pytestmark = pytest.mark.skipif("mindspore" not in INSTALLED, reason="the commands' MindSpore side")

CELL = ("--framework", "mindspore", "--factory", "nets_ms:net")
SHAPE = ("--example", "2,3,8,8")


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    (tmp_path / "nets_ms.py").write_text(tiny_models.MS_NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments]).exception


def test_prune_sparsify_export_and_inspect_a_cell(tmp_path):
    planned = run("prune", *CELL, *SHAPE, "--keep-ratio", 0.6, "--alignment", 8, "-o", "p", "--dry-run", "--json")
    assert not (tmp_path / "p").exists()
    done = run("prune", *CELL, *SHAPE, "--keep-ratio", 0.6, "--alignment", 8, "-o", "p", "--json")
    assert done["parameters"] == planned["parameters"] < done["parameters_before"]
    assert run("sparsify", *CELL, "-m", "p", "--method", "magnitude", "-o", "s", "--dry-run", "--json")["weights"]
    sparse = run("sparsify", *CELL, "-m", "p", "--method", "magnitude", "-o", "s", "--json")
    measured = run("inspect", "s", *CELL, *SHAPE, "--macs", "--json")["facts"]
    assert measured["parameters"] == done["parameters"]
    assert measured["zeros"] >= sparse["zeros"]
    for name, more in (("m.mindir", ("--format", "mindir")), ("m.onnx", ())):
        out = run("export", *CELL, *SHAPE, "-m", "s", "-o", name, *more, "--json")
        assert out["max_difference"] < 1e-4
        assert (tmp_path / name).stat().st_size == out["file_bytes"]


def test_arrays_calibrate_and_a_checkpoint_is_read_again(tmp_path):
    np.save("x.npy", np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32))
    done = run("sparsify", *CELL, "--method", "wanda", "--calib", "x.npy", "-o", "s", "--json")
    seen = run("inspect", "s/model.ckpt", "--json")
    assert sum(row["zeros"] or 0 for row in seen["rows"]) == done["zeros"]
    assert run("inspect", "s/model.ckpt", *CELL, *SHAPE, "--macs", "--json")["facts"]["zeros"] == done["zeros"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_are_refused_before_each_does_a_part_by_itself(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    np.savez("x.npz", x=np.zeros((8, 3, 8, 8), np.float32), labels=np.zeros(8, np.int64))
    for command in (("sparsify", "--method", "magnitude"), ("train", "--data", "x.npz"), ("adapt", "--data", "x.npz")):
        found = refused(command[0], *CELL, *command[1:], "-o", "out")
        assert isinstance(found, ConfigError), found
        assert "2 processes" in str(found)
        assert "leave torchrun out" in str(found)
        assert not (tmp_path / "out").exists()


def test_what_mindspore_lacks_says_so(tmp_path):
    np.save("x.npy", np.zeros((2, 3), np.float32))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    for arguments, kind, words in (
        (("prune", "--framework", "mindspore", "-m", ".", "-o", "x"), ConfigError, "--factory"),
        (("sparsify", *CELL, "--calib", "t.jsonl", "-o", "x"), ConfigError, "tokenizer"),
        (("export", *CELL, *SHAPE, "--format", "w16a16s", "-o", "x"), ConfigError, "config.json"),
        (
            ("distill", "-f", "mindspore", "-m", ".", "-d", "x.npy", "--student-arg", "a=1", "-o", "x"),
            ConfigError,
            "--f",
        ),
        (("adapt", "-f", "mindspore", "-m", ".", "-d", "t.jsonl", "-o", "x"), ConfigError, "tokenizer"),
        (("inspect", *CELL, *SHAPE, "--device", "npu"), ConfigError, "Ascend"),
    ):
        error = refused(*arguments)
        assert isinstance(error, kind), (arguments, error)
        assert words in str(error)
    assert not (tmp_path / "x").exists()
