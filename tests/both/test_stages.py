"""A recipe's stages in both frameworks: the same steps, the same report, and a stopped run that resumes."""

from __future__ import annotations

import shutil
import sys
import textwrap

import pytest

from slimkit.core.errors import ConfigError
from slimkit.core.run import report
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import parse_recipe
from slimkit.core.run.stages import Stages

TASK = """
    import numpy as np
    from tests import kits
    from small_data import digits

    kit = kits.make(FRAMEWORK)

    def build(width=16):
        return kit.named(
            conv=kit.conv(1, width, 3, padding=1, bias=False), bn=kit.batch_norm(width), act=kit.relu(),
            conv2=kit.conv(width, width, 8), act2=kit.relu(), flat=FLAT,
            hidden=kit.linear(width, width), act3=kit.relu(), head=kit.linear(width, 4),
        )

    def data():
        images, labels = digits()
        batches = [(kit.tensor(images[i : i + 8]), kit.tensor(labels[i : i + 8])) for i in range(0, 32, 8)]
        return {"train": batches, "calibration": [b[0] for b in batches], "example": batches[0][0]}

    def size(model, data, dense):
        return {"tensors": float(len(kit.params(model)))}
"""
BESIDE = """
    import numpy as np

    def digits():
        rng = np.random.default_rng(0)
        return rng.standard_normal((32, 1, 8, 8)).astype(np.float32), rng.integers(0, 4, 32).astype(LABELS)
"""
TRAIN = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}
STAGES = [
    {"train": TRAIN},
    {"prune": {"reserved_ratio": 0.7, "alignment": 4, "compensation_batches": 2}},
    {"distill": {**TRAIN, "outputs": [{"teacher": 0, "student": 0, "loss": "KDMse"}], "hard_weight": 0.5}},
    {"sparsify": {"sparse_ratio": 0.5, "calibration_batches": 2}},
    {"finetune": {**TRAIN, "keep_zeros": True}},
    {"adapt": {**TRAIN, "targets": ["hidden"], "rank": 2}},
    {"export": {"compare_dense": True}},
]


@pytest.fixture
def task(kit, tmp_path, monkeypatch):
    flat = {"torch": "kit.torch.nn.Flatten()", "mindspore": "kit.ms.nn.Flatten()"}[kit.name]
    labels = {"torch": "np.int64", "mindspore": "np.int32"}[kit.name]
    text = textwrap.dedent(TASK).replace("FRAMEWORK", repr(kit.name)).replace("FLAT", flat)
    (tmp_path / f"task_{kit.name}.py").write_text(text)
    (tmp_path / "small_data.py").write_text(textwrap.dedent(BESIDE).replace("LABELS", labels))
    monkeypatch.delitem(sys.modules, "small_data", raising=False)
    return tmp_path


def recipe(kit, **changes):
    place = f"task_{kit.name}.py"
    content = {
        "version": 1, "name": "small", "framework": kit.name, "model": f"{place}:build", "data": f"{place}:data",
        "metrics": f"{place}:size", "stages": STAGES,
    }  # fmt: skip
    return parse_recipe({**content, **changes})


def wing(kit):
    return Stages(getattr(kit.room("jobs"), {"torch": "TorchJobs", "mindspore": "MindSporeJobs"}[kit.name])())


def numbers(report):
    return [(s["name"], s["digest"], s["metrics"], s["measurement"]["zeros"]) for s in report["stages"]]


def test_every_stage_runs_and_a_run_cut_short_goes_on_to_the_same_weights(kit, task, monkeypatch):
    found = run_recipe(recipe(kit), task, wing(kit), task / "run")
    stages = {s["kind"]: s for s in found["stages"]}
    dense, final = stages["train"]["measurement"], stages["export"]["measurement"]
    assert found["complete"]
    assert stages["prune"]["measurement"]["parameters"] < 0.75 * dense["parameters"]
    assert stages["prune"]["measurement"]["macs"] < dense["macs"]
    assert dense["zeros"] < stages["sparsify"]["measurement"]["zeros"] == stages["finetune"]["measurement"]["zeros"]
    assert stages["adapt"]["facts"]["reload_difference"] <= 1e-5  # what the stage itself demands
    assert stages["export"]["facts"]["onnx"]["opset"] == 13
    assert stages["export"]["facts"]["onnx"]["zeros"] > 0, "zeros survive into the file"
    assert ("mindir" in stages["export"]["facts"]) == (kit.name == "mindspore")
    assert stages["export"]["facts"]["latency_ratio"] > 0
    assert dense["dense_ms"] is None
    assert stages["prune"]["measurement"]["dense_ms"] > 0, "timed in turn with the dense model"
    assert final == stages["adapt"]["measurement"] or final["dense_ms"] == stages["finetune"]["measurement"]["dense_ms"]
    goals = {s["kind"]: s["facts"]["goal"] for s in found["stages"] if "goal" in s["facts"]}
    assert goals["prune"]["reached"] == pytest.approx(goals["prune"]["asked"], abs=0.25)
    assert goals["sparsify"]["reached"] == pytest.approx(goals["sparsify"]["asked"], abs=0.02)
    assert [layer["sparsity"] > 0.3 for layer in final["layers"] if layer["name"] == "hidden"] == [True]
    assert "Layer by layer" in (task / "run" / "report.html").read_text()

    shutil.copytree(task / "run", task / "cut short")
    for late in sorted((task / "cut short" / "stages").glob("0[5-9]-*")):
        shutil.rmtree(late)
    (task / "cut short" / "stages" / ".05-finetune.x.part").mkdir()
    monkeypatch.setattr(report, "render", lambda _: "")  # the page has been looked at
    resumed = run_recipe(recipe(kit), task, wing(kit), task / "cut short")
    assert numbers(resumed) == numbers(found)


def test_a_mindir_is_refused_where_no_mindspore_runs(kit, task):
    stages = [{"export": {"formats": ["mindir"]}}]
    if kit.name == "mindspore":
        found = run_recipe(recipe(kit, stages=stages), task, wing(kit), task / "run")
        assert (task / "run" / "stages" / "01-export" / "model.mindir").exists()
        assert set(found["stages"][1]["facts"]) == {"headline", "mindir"}
        return
    with pytest.raises(ConfigError, match=r"stages\[0\].export.formats: mindir is MindSpore's"):
        run_recipe(recipe(kit, stages=stages), task, wing(kit), task / "run")
    assert not (task / "run" / "stages" / "01-export").exists()
