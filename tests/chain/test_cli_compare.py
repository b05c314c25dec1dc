"""`slimkit compare`: folders, deltas and factories judged on one file, in both frameworks."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import numpy as np
import pytest

from slimkit.core.compare.comparison import Comparison
from slimkit.core.compare.judge import JudgeOptions
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.options import CompareOptions
from tests.chain import tiny_models
from tests.chain.test_cli_commands import refused, run
from tests.conftest import INSTALLED

SENTENCES = [
    "the cat sat on the mat and the dog ran over the big red cat",
    "a small blue dog is not very bad",
    "the mat was red",
]

NETS = {
    "torch": """
import numpy as np, torch
from torch import nn
def net(): return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
def documents(): return np.random.default_rng(0).integers(0, 11, (5, 9)).tolist()
def size(model, dataset): return float(len(dataset))
""",
    "mindspore": """
import numpy as np
from mindspore import nn
def net(): return nn.SequentialCell(nn.Embedding(11, 4), nn.Dense(4, 11))
def documents(): return np.random.default_rng(0).integers(0, 11, (5, 9)).tolist()
def size(model, dataset): return float(len(dataset))
""",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_models.hugging_face(tmp_path, "llama")
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders are PyTorch's")
def test_folders_are_compared_on_a_text_and_conditions_fail_the_command(here):
    run("sparsify", "--model", "llama", "--method", "magnitude", "--sparsity", "0.5", "--out", "half")
    found = run("compare", "llama", "half", "--text", "held.jsonl", "--length", "8", "--json")
    dense, half = found["results"]
    assert found["data"]["documents"] == len(SENTENCES)
    assert half["figures"]["perplexity"] != dense["figures"]["perplexity"]
    assert half["figures"]["kl"] > 0
    assert half["figures"]["nonzero"] < dense["figures"]["nonzero"]
    assert half["figures"]["bytes"] == (here / "half" / "model.safetensors").stat().st_size
    shown = run("compare", "llama", "half", "--text", "held.jsonl", "--length", "8", "--no-speed", "--save", "c.json")
    assert "perplexity" in shown
    assert "windows of 8 tokens" in shown
    exact = run("compare", "llama", "half", "--text", "held.jsonl", "--length", "8", "--no-speed", "--exact", "--json")
    assert exact["kl"] == "exact"
    # The table of 256 tokens is larger than the tiny vocabulary: both are exact, but for float32.
    assert exact["results"][1]["figures"]["kl"] == pytest.approx(half["figures"]["kl"], abs=1e-6)
    assert Comparison.load(here / "c.json").results[1].name == "half"
    failed = run("compare", "llama", "half", "--text", "held.jsonl", "--no-speed", "--fail-if", "kl > 0", code=1)
    assert "Failed: half: kl is" in failed
    run("compare", "llama", "llama", "--text", "held.jsonl", "--no-speed", "--fail-if", "kl > 1e-6")


@pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders are PyTorch's")
def test_a_delta_on_its_base_is_a_model(here):
    import slimkit

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("llama")
    slimkit.apply_delta(model, "lora", "*q_proj", rank=2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_()
    slimkit.save_delta(model, "delta")
    found = run("compare", "llama", "llama+delta", "--text", "held.jsonl", "--no-speed", "--json")
    assert found["results"][1]["figures"]["kl"] > 0
    assert found["results"][1]["figures"]["bytes"] > found["results"][0]["figures"]["bytes"]


@pytest.mark.parametrize("framework", INSTALLED)
def test_factories_and_data_of_ones_own_in_both_frameworks(tmp_path, monkeypatch, framework):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS[framework])
    found = run(
        "compare", "nets.py:net", "nets.py:net", "-f", framework, "--data", "nets.py:documents", "--length", "4",
        "--metric", "nets.py:size", "--json",
    )  # fmt: skip
    other = found["results"][1]["figures"]
    assert found["data"]["predicted tokens"] == 5 * 6  # windows of 4, 4 and 1 tokens
    assert other["size"] == 5
    assert other["prefill_per_s"] > 0
    assert np.isfinite(other["kl"])


def test_what_is_missing_is_said_before_a_model_is_opened(here):
    for arguments, match in (
        (("compare", "llama", "llama"), "--text FILE"),
        (("compare", "llama", "lama", "--text", "held.jsonl"), "which does not exist"),
        (("compare", "llama", "llama+nothing", "--text", "held.jsonl"), "no delta folder"),
        (("compare", "llama", "llama", "--text", "held.jsonl", "--fail-if", "kl >"), "METRIC"),
        (("compare", "llama", "llama", "--text", "held.jsonl", "--task", "classifier"), "--data"),
    ):
        error = refused(*arguments)
        assert isinstance(error, ConfigError)
        assert match in str(error), str(error)


def test_the_command_has_the_defaults_of_python():
    """But for the KL: a command opens folders one at a time."""
    python = {f.name: f.default for f in fields(JudgeOptions)}
    command = {name: field.default for name, field in CompareOptions.model_fields.items()}
    both = set(python) & set(command) - {"top_k"}
    assert both == {"task", "length", "bos", "speed"}
    assert {n: python[n] for n in both} == {n: command[n] for n in both}
    for package in [{"torch": "slimkit", "mindspore": "slimkit_ms"}[f] for f in INSTALLED]:
        signature = inspect.signature(__import__(package).compare_models).parameters
        assert {n: signature[n].default for n in python} == python
