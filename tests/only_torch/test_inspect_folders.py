"""`slimkit inspect` and `load` know every kind of file and folder that slimkit writes."""

from __future__ import annotations

import json
import textwrap

import pytest
from typer.testing import CliRunner

import slimkit
from slimkit.cli import app
from slimkit.core import files
from slimkit.core.jobs import folders
from slimkit.core.jobs.inspecting import kind_of
from slimkit.core.run.pipeline import run_recipe
from tests.core.test_pipeline import TASK, NumpyWing, recipe

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def weights(folder, name="model.safetensors", report=None):
    folder.mkdir()
    write = mindspore if name.endswith(".ckpt") else lambda file: slimkit.save_checkpoint(net(), file)
    write(folder / name)
    if report:
        folders.write_report(folder, report, {"layers": {}})


def mindspore(file):
    whole = file.with_suffix(".pt")
    torch.save(net().state_dict(), whole)
    slimkit.convert_checkpoint(whole, file)
    whole.unlink()


def pruned(folder):
    model = net()
    slimkit.save_pruned(folder, model, slimkit.PruneTorch(model).set_alignment(1).prune(0.5, []))


def desc(file):
    _, made = slimkit.PruneTorch(net()).set_alignment(1).analysis(0.5, [])
    file.write_text(json.dumps(made))


def delta(folder, form):
    model = net()
    slimkit.apply_delta(model, "lora", ["0"], rank=2)
    slimkit.save_delta(model, folder, **({"format": "peft"} if form == "peft" else {}))


def w16a16s(folder):
    model = net()
    slimkit.Compressor(model, slimkit.SparseConfig()).compress([])
    slimkit.save_w16a16s(folder, model, {"model_type": "none"})


def trainer(folder):
    class Saves(slimkit.TrainerCallback):
        def on_epoch_end(self, trainer):
            trainer.save_checkpoint(folder)

    data = [(torch.ones(2, 8), torch.zeros(2, 4))]
    slimkit.Trainer(net(), loss_func=nn.MSELoss(), callbacks=[Saves()]).train(data, 1)


def cache(folder):
    told = slimkit.KnowledgeDistillConfig().add_output_soft_label(
        {"t_output_idx": 0, "s_output_idx": 0, "loss_func": [{"func_name": "KDCrossEntropy", "func_weight": 1}]}
    )
    slimkit.TeacherCache.build(net(), [torch.ones(2, 8)], told, folder, top_k=2)


def run(folder, whole=True):
    folder.mkdir()
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    run_recipe(recipe(stages=[{"train": {"epochs": 1}}]), folder, NumpyWing(), folder)
    if not whole:
        (folder / "report.json").unlink()


def onnx(file):
    slimkit.export_onnx(net(), torch.ones(1, 8), file)


# what writes it -> (its name, what `inspect` calls it, what `load` calls it)
KINDS = {
    "a file of weights": (lambda p: slimkit.save_checkpoint(net(), p), "a.safetensors", "weights", "weights"),
    "weights of MindSpore": (mindspore, "a.ckpt", "weights", "weights"),
    "a folder of weights": (weights, "a", "model", "model"),
    "a folder of MindSpore": (lambda p: weights(p, "model.ckpt"), "a", "weights", "weights"),
    "sparse": (lambda p: weights(p, report="sparse"), "a", "model", "sparse"),
    "sparse of MindSpore": (lambda p: weights(p, "model.ckpt", "sparse"), "a", "weights", "sparse"),
    "student": (lambda p: weights(p, report="distill"), "a", "model", "student"),
    "pruned": (pruned, "a", "pruned", "pruned"),
    "a plan": (desc, "a.json", "desc", "desc"),
    "a delta": (lambda p: delta(p, "slimkit"), "a", "bundle", "bundle"),
    "a delta of PEFT": (lambda p: delta(p, "peft"), "a", "peft", "peft"),
    "w16a16s": (w16a16s, "a", "w16a16s", "w16a16s"),
    "onnx": (onnx, "a.onnx", "onnx", "onnx"),
    "a run": (run, "a", "run", "run"),
    "an unfinished run": (lambda p: run(p, whole=False), "a", "run", "run"),
    "a trainer's checkpoint": (trainer, "a", "trainer checkpoint", "trainer checkpoint"),
    "a teacher cache": (cache, "a", "teacher cache", "teacher cache"),
}


@pytest.mark.parametrize("name", KINDS)
def test_inspect_and_load_know_what_slimkit_writes(name, tmp_path):
    write, place, inspected, loaded = KINDS[name]
    write(tmp_path / place)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / place), "--json"], standalone_mode=False)
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["kind"] == inspected
    assert found["facts"]
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / place)], standalone_mode=False)
    assert told.exception is None
    assert told.stdout.splitlines()[0].endswith(f": {inspected}")
    opened = slimkit.load(tmp_path / place)
    assert opened.kind == loaded
    assert opened.next
    if "MindSpore" in name:
        fresh = net()
        nn.init.zeros_(fresh[0].weight)
        assert slimkit.load(tmp_path / place, fresh).model is fresh
        assert torch.equal(fresh[0].weight, net()[0].weight)


def test_what_nothing_of_ours_is_names_what_was_looked_for(tmp_path):
    with pytest.raises(files.FileFormatError, match=r"model\.ckpt.*a run, a trainer's checkpoint or a teacher cache"):
        kind_of(tmp_path)
