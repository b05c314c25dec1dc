"""Folders converted whole: shards, index, configuration and tokenizer, there and back, and nothing half written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core import files
from slimkit.core.checkpoint.openweights import open_weights, refuse_torch
from slimkit.core.errors import SlimkitError

RNG = np.random.default_rng(0)
SHARDS = {
    "model-00001-of-00002.safetensors": {"embeddings.word_embeddings.weight": (8, 4), "h.0.LayerNorm.weight": (4,)},
    "model-00002-of-00002.safetensors": {"h.0.LayerNorm.bias": (4,), "h.0.dense.weight": (4, 4)},
}
BESIDE = {"config.json": '{"architectures": ["BertModel"]}', "tokenizer.json": "{ }", "vocab.txt": "a\nb\r\n"}


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments], standalone_mode=False)
    if code == 0:
        assert done.exception is None, done.exception
        return json.loads(done.stdout) if "--json" in arguments else done.stdout
    assert isinstance(done.exception, SlimkitError), done.exception
    return str(done.exception)


@pytest.fixture(params=["shards", "one file", "ckpt"])
def folder(request, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    shards = {
        n: {k: RNG.standard_normal(s).astype(np.float32) for k, s in about.items()} for n, about in SHARDS.items()
    }
    if request.param == "shards":
        for name, tensors in shards.items():
            files.write_tensors(made / name, tensors, {"format": "pt"})
        table = {key: name for name, tensors in shards.items() for key in tensors}
        index = {"metadata": {"total_size": 4 * 56, "own": "kept"}, "weight_map": table}
        files.write_json(made / "model.safetensors.index.json", index)
    else:
        files.write_tensors(made / "model.safetensors", {k: v for t in shards.values() for k, v in t.items()})
    if request.param == "ckpt":
        call("convert", made / "model.safetensors", made / "model.ckpt", "--to", "mindspore", "--no-manifest")
        (made / "model.safetensors").unlink()
    for name, text in BESIDE.items():
        (made / name).write_text(text, newline="")
    (made / "runs").mkdir()
    return made


def tensors(folder):
    with open_weights(folder, refuse_torch) as weights:
        return {name: weights.raw(name) for name in weights.entries}


def test_a_folder_goes_there_and_back(folder, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    first = "torch" if (folder / "model.ckpt").exists() else "mindspore"
    planned = call("convert", folder, there, "--dry-run", "--json")
    assert not there.exists()
    done = call("convert", folder, there, "--json")
    assert done["to"] == first
    assert done["renamed"] == planned["renamed"]
    assert {"h.0.LayerNorm.weight", "h.0.LayerNorm.gamma"} & set(done["renamed"])
    assert done["carried"] == sorted(BESIDE)
    assert done["left"] == ["runs"], "what did not come along is named"
    call("convert", there, back)
    for name, text in BESIDE.items():
        assert (back / name).read_bytes() == text.encode(), name
    was, now = tensors(folder), tensors(back)
    assert set(was) == set(now)
    for name, array in was.items():
        assert np.array_equal(array, now[name]), name
    if list(folder.glob("*-of-*")):
        assert {f.name for f in back.glob("*.safetensors")} == set(SHARDS)
        for name in SHARDS:
            assert (back / name).read_bytes() == (folder / name).read_bytes(), "the same bytes"
        index = "model.safetensors.index.json"
        assert files.read_json(back / index) == files.read_json(folder / index)
    assert not list(tmp_path.glob(".*.part"))


def test_a_filled_folder_is_kept_without_force_and_a_failure_writes_nothing(folder, tmp_path):
    there = tmp_path / "there"
    call("convert", folder, there)
    before = {f.name: f.read_bytes() for f in there.iterdir()}
    assert "--force" in call("convert", folder, there, code=2)
    wrong = call("convert", folder, there, "--force", "--only", "*dense*", "--only", "h.0.LayerNorm.weigth", code=2)
    assert wrong.startswith("--only: no tensor of SRC is named 'h.0.LayerNorm.weigth'. Did you mean 'h.0.LayerNorm.")
    assert {f.name: f.read_bytes() for f in there.iterdir()} == before
    assert "holds what the command reads" in call("convert", folder, folder, "--force", code=2)
    call("convert", folder, there, "--force", "--only", "*LayerNorm*")
    assert len(tensors(there)) == 2
    new = tmp_path / "new"
    assert "--only: no tensor" in call("convert", folder, new, "--only", "nothing*", code=2)
    assert not new.exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_shard_is_refused_by_its_manifest_and_a_pruned_folder_by_its_plan(tmp_path):
    source, there = tmp_path / "a", tmp_path / "there"
    source.mkdir()
    files.write_tensors(source / "model.safetensors", {"fc.weight": np.ones((2, 2), np.float32)})
    call("convert", source, there, "--to", "mindspore")
    raw = bytearray((there / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (there / "model.safetensors").write_bytes(bytes(raw))
    assert "manifest" in call("convert", there, tmp_path / "b", "--to", "torch", code=2)
    assert not (tmp_path / "b").exists()
    (source / "plan.json").write_text("{}")
    assert "prune it there" in call("convert", source, tmp_path / "b", code=2)
