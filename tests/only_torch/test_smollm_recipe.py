"""The language model's recipe on a twin of two random blocks: out of a GGUF file, through all stages, to a report."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import slimkit
from tests.only_torch.test_gguf import gguf, model_of, tokens_of, write

assert gguf is not None  # the file of the twin is written by it
ROOT = Path(__file__).parents[2]
SHORT = {
    "model.arguments.folder": "model",
    "data.arguments": "{folder: model, text: text, length: 64, train: 8, calibration: 2, held_out: 2, task: 8}",
    "stages.0.cut.arguments": "{ffn: 160}",
}


@pytest.fixture
def folder(tmp_path):
    tokens = tokens_of()
    model = model_of(
        vocab_size=len(tokens[0]), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    write(model, tmp_path / "m.gguf", "Q8_0", tokens=tokens)
    slimkit.convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
    rng = random.Random(0)
    (tmp_path / "text").mkdir()
    for part in ("calibration", "training", "held_out"):
        lines = [{"text": " ".join(rng.choices("the cat sat on that mat with them".split(), k=60))} for _ in range(8)]
        (tmp_path / "text" / f"{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


@pytest.mark.slow  # six stages in a process of its own
def test_the_twin_runs_to_its_report(folder):
    done = subprocess.run(
        [
            sys.executable, "-m", "slimkit", "run", str(ROOT / "tools" / "recipes" / "smollm.yaml"), "-o", "run",
            *(x for key, value in SHORT.items() for x in ("--set", f"{key}={value}")),
        ],
        capture_output=True, text=True, cwd=folder, timeout=500, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["complete"]
    stages = {s["kind"]: s for s in report["stages"]}
    assert list(stages) == ["load", "cut", "distill", "sparsify", "adapt", "export"]
    dense, cut, distilled, sparse, adapted, exported = stages.values()
    assert dense["metrics"]["KL to dense"] == 0
    assert dense["metrics"]["agreement with dense"] == 1
    assert cut["metrics"]["KL to dense"] > distilled["metrics"]["KL to dense"] > 0
    assert cut["measurement"]["parameters"] < dense["measurement"]["parameters"]
    # Half of each matrix of the blocks, and nothing of the table, which is tied.
    halves = {layer["name"].endswith("_proj"): set() for layer in sparse["measurement"]["layers"]}
    for layer in sparse["measurement"]["layers"]:
        halves[layer["name"].endswith("_proj")].add(layer["sparsity"])
    assert halves == {True: {0.5}, False: {0.0}}
    assert adapted["metrics"]["perplexity of summaries"] < sparse["metrics"]["perplexity of summaries"]
    assert exported["facts"]["onnx"]["max_difference"] < 1e-4
    assert exported["facts"]["onnx"]["open_axes"]
    for stage in stages.values():
        assert len(stage["samples"]) == 3
    page = (folder / "run" / "report.html").read_text()
    assert "What the models say" in page
    assert "What does a garbage collector do?" in page
