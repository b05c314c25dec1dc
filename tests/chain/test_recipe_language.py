"""Recipes of language models: a folder without a factory, text to calibrate on, text that judges, a comparison."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.compare.comparison import Comparison
from slimkit.core.errors import ConfigError
from slimkit.core.run.checking import check_recipe
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import parse_recipe
from slimkit.core.run.stages import Stages
from tests.chain import tiny_models
from tests.chain.test_cli_calibration import write_text
from tests.conftest import INSTALLED

torch_only = pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders are PyTorch's")

NETS = {
    "torch": """
import numpy as np, torch
from torch import nn
def net(): return nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 23))
def batch(x): return torch.from_numpy(x)
""",
    "mindspore": """
import numpy as np, mindspore as ms
from mindspore import nn
def net():
    ms.set_seed(0)
    return nn.SequentialCell(nn.Embedding(23, 8), nn.Dense(8, 23))
def batch(x): return ms.Tensor(x.astype(np.int32))
""",
}
DATA = """
def data():
    rows = np.random.default_rng(0).integers(0, 23, (12, 30))
    return {"train": [1], "example": batch(rows[:1]), "calibration": [batch(rows[:4])], "texts": rows[6:].tolist()}
"""


def face_of(framework):
    if framework == "torch":
        from slimkit.jobs import TorchJobs

        return Stages(TorchJobs())
    from slimkit_ms.jobs import MindSporeJobs

    return Stages(MindSporeJobs())


@pytest.fixture
def here(tmp_path):
    tiny_models.hugging_face(tmp_path, "llama")
    for seed, name in enumerate(("calib", "held")):
        write_text(tmp_path / f"{name}.jsonl", seed)
    return tmp_path


def language(**more):
    return {
        "version": 1, "name": "lm", "model": "llama",
        "calibrate": {"text": "calib.jsonl", "samples": 6, "length": 24},
        "evaluate": {"text": "held.jsonl", "documents": 5, "length": 24},
        "stages": [
            {"sparsify": {"method": "wanda"}}, {"sparsify": {"method": "wanda", "sparse_ratio": 0.75}},
            {"compare": {"speed": False}},
        ],
        **more,
    }  # fmt: skip


@torch_only
def test_a_folder_is_sparsified_judged_and_compared_without_a_factory(here):
    report = run_recipe(parse_recipe(language()), here, face_of("torch"), here / "run")
    dense, first, second, compared = report["stages"]
    assert set(dense["metrics"]) == {"perplexity"}
    assert set(first["metrics"]) == {"perplexity", "kl", "agreement"}
    assert 0 < first["metrics"]["kl"] < second["metrics"]["kl"]
    found = Comparison.load(here / "run" / "stages" / "03-compare" / "comparison.json")
    assert [r.name for r in found.results] == ["dense", "01-sparsify", "02-sparsify"]
    for stage, result in zip((dense, first, second), found.results):
        assert result.figures["perplexity"] == pytest.approx(stage["metrics"]["perplexity"], rel=1e-5)
    assert found["02-sparsify"].figures["kl"] == pytest.approx(second["metrics"]["kl"], rel=1e-3, abs=1e-6)
    assert "<svg" in (here / "run" / "stages" / "03-compare" / "comparison.html").read_text(encoding="utf-8")
    page = (here / "run" / "report.html").read_text(encoding="utf-8")
    assert "Comparison: <code>03-compare</code>" in page
    assert "KL(dense || model), nats" in page
    assert compared["facts"]["headline"].startswith("02-sparsify: perplexity")
    again = run_recipe(parse_recipe(language()), here, face_of("torch"), here / "run")
    assert json.dumps(again["stages"]) == json.dumps(report["stages"])


@pytest.mark.parametrize("framework", INSTALLED)
def test_rows_of_tokens_judge_networks_of_ones_own_in_both_frameworks(tmp_path, framework):
    (tmp_path / f"own_{framework}.py").write_text(NETS[framework] + DATA)
    task = f"own_{framework}.py"
    recipe = parse_recipe(
        {
            "version": 1, "name": "own", "framework": framework, "model": f"{task}:net", "data": f"{task}:data",
            "evaluate": {"data": "texts", "length": 10, "windows": 2},
            "stages": [{"sparsify": {"method": "wanda"}}, {"compare": {}}],
        }
    )  # fmt: skip
    report = run_recipe(recipe, tmp_path, face_of(framework), tmp_path / "run")
    stage, compared = report["stages"][1:]
    told = Comparison.from_dict(compared["facts"]["comparison"])
    assert told.data["documents"] == 6
    assert told.data["windows"] == 12
    assert told["01-sparsify"].figures["perplexity"] == pytest.approx(stage["metrics"]["perplexity"], rel=1e-5)
    assert np.isfinite(stage["metrics"]["kl"])


@torch_only
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"evaluate": {"text": "calib.jsonl"}}, "evaluate: 6 of 6 calibration windows"),
        ({"evaluate": {"text": "nothing.jsonl"}}, "nothing.jsonl"),
        ({"evaluate": {"data": "texts"}}, "no key 'texts'"),
        ({"model": "lama"}, "model: must be file.py:function"),
        ({"stages": [{"cut": {"arguments": {}}}]}, r"stages\[0\].cut: needs a model factory"),
        ({"stages": [{"finetune": {}}]}, "keys train and example"),
        ({"stages": [{"compare": {}}]}, r"stages\[0\].compare: no stage before it"),
        ({"evaluate": None, "stages": [{"sparsify": {}}, {"compare": {}}]}, "needs held-out data"),
        ({"calibrate": None}, "needs calibration batches"),
        ({"stages": [{"sparsify": {}}, {"compare": {"length": 7}}]}, "differs from evaluate.length"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(here, change, match):
    with pytest.raises((ConfigError, ValueError), match=match):
        run_recipe(parse_recipe(language(**change)), here, face_of("torch"), here / "run")


@torch_only
def test_check_looks_at_a_recipe_without_a_factory(here):
    check_recipe(parse_recipe(language()), here, ("onnx",))
    with pytest.raises(ConfigError, match="needs a model factory"):
        check_recipe(parse_recipe(language(stages=[{"cut": {"arguments": {}}}])), here, ("onnx",))


@pytest.mark.parametrize(
    ("evaluate", "match"), [({}, "give text or data"), ({"text": "a", "data": "b"}, "not both"), ({"txt": 1}, "txt")]
)
def test_evaluate_says_where_its_text_is(evaluate, match):
    with pytest.raises(ConfigError, match=match):
        parse_recipe(language(evaluate=evaluate))
