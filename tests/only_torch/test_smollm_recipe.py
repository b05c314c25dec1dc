"""The language model's recipe on a twin of two random blocks: out of a GGUF file, through all stages, to a report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slimkit
from slimkit.cli import app
from tests.only_torch.test_gguf import gguf, model_of, tokens_of, write

assert gguf is not None  # the file of the twin is written by it
ROOT = Path(__file__).parents[2]


def short(folder):
    """The recipe's places, and fewer of everything."""
    text = folder / "text"
    return {
        "model": folder / "model",
        "data.arguments": f"{{folder: {folder / 'model'}, text: {text}, length: 64, train: 8, task: 8}}",
        "calibrate": f"{{text: {text / 'calibration.jsonl'}, samples: 4, length: 64}}",
        "evaluate": f"{{text: {text / 'held_out.jsonl'}, documents: 4, length: 64, windows: 1}}",
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


@pytest.mark.slow  # seven stages, and torch's newer exporter
def test_the_twin_runs_to_its_report(folder):
    recipe = ROOT / "tools" / "recipes" / "smollm.yaml"
    given = [x for key, value in short(folder).items() for x in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, ["run", str(recipe), "-o", str(folder / "run"), *given])
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["complete"]
    stages = {s["kind"]: s for s in report["stages"]}
    assert list(stages) == ["load", "prune", "distill", "sparsify", "adapt", "export", "compare"]
    dense, pruned, distilled, sparse, adapted, exported, judged = stages.values()
    assert "kl" not in dense["metrics"]
    assert pruned["metrics"]["kl"] > distilled["metrics"]["kl"] > 0
    told = pruned["facts"]["report"]
    assert told["form"]["name"] == "config"
    assert len(told["compensation"]["refitted"]) == 2
    assert "lm_head" in told["compensation"]["left"]
    assert pruned["measurement"]["parameters"] < dense["measurement"]["parameters"]
    # Half of each matrix of the blocks, and nothing of the table, which is tied.
    halves = {layer["name"].endswith("_proj"): set() for layer in sparse["measurement"]["layers"]}
    for layer in sparse["measurement"]["layers"]:
        halves[layer["name"].endswith("_proj")].add(layer["sparsity"])
    assert halves == {True: {0.5}, False: {0.0}}
    assert adapted["metrics"]["perplexity of summaries"] < sparse["metrics"]["perplexity of summaries"]
    assert exported["facts"]["onnx"]["max_difference"] < 1e-4
    assert exported["facts"]["onnx"]["open_axes"]
    table = {row["name"]: row["figures"] for row in judged["facts"]["comparison"]["results"]}
    assert list(table) == ["dense", "01-prune", "02-distill", "03-sparsify", "04-adapt"]
    for name, kind in (("dense", "load"), ("01-prune", "prune"), ("04-adapt", "adapt")):
        assert table[name]["perplexity"] == pytest.approx(stages[kind]["metrics"]["perplexity"], rel=1e-5)
    assert (folder / "run" / "stages" / "06-compare" / "comparison.html").is_file()
    for stage in stages.values():
        assert len(stage["samples"]) == 3
    page = (folder / "run" / "report.html").read_text()
    assert "What the models say" in page
    assert "What does a garbage collector do?" in page
