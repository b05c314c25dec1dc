"""`slimkit train`, the model cards of every command that writes a model, and what sparsify says it cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core import files
from tests.chain import tiny_models
from tests.conftest import INSTALLED

NETS = [
    pytest.param(
        ("--factory", "one.py:net"),
        marks=pytest.mark.skipif("torch" not in INSTALLED, reason="PyTorch's side"), id="torch",
    ),
    pytest.param(
        ("-f", "mindspore", "--factory", "two.py:net"),
        marks=pytest.mark.skipif("mindspore" not in INSTALLED, reason="MindSpore's side"), id="mindspore",
    ),
]  # fmt: skip


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
    (tmp_path / "one.py").write_text(tiny_models.TORCH_PLAIN)
    (tmp_path / "two.py").write_text(tiny_models.MS_PLAIN)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "labelled.npz", x=x, labels=x[:, :3].argmax(1))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("net", NETS)
def test_training_a_sparse_model_keeps_its_zeros_and_writes_what_it_read(tmp_path, net):
    said = run("sparsify", *net, "--method", "wanda", "--calib", "x.npz", "-o", "sparse")
    assert "Worst layers: fc" in said
    weights = "model.ckpt -f mindspore" if "mindspore" in net else "model.safetensors"
    factory = net[-1]
    assert f"Measure what it lost: slimkit compare {factory} {factory}=sparse/{weights} --data" in said
    teach = ("train", *net, "-m", "sparse", "--data", "labelled.npz", "--learning-rate", 0.01, "--epochs", 8)
    planned = run(*teach, "-o", "tuned", "--dry-run", "--json")
    assert not (tmp_path / "tuned").exists()
    done = run(*teach, "--eval", "labelled.npz", "-o", "tuned", "--json")
    assert done["zero_layers"] == planned["zero_layers"] == 2
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    assert set(done["evaluation"]) == {"loss", "accuracy"}
    weights = "model.ckpt" if "mindspore" in net else "model.safetensors"
    zeros = {folder: run("inspect", tmp_path / folder / weights, "--json") for folder in ("sparse", "tuned")}
    counted = {f: {r["tensor"]: r["zeros"] for r in seen["rows"] if r["zeros"]} for f, seen in zeros.items()}
    assert counted["sparse"]["fc1.weight"] == counted["tuned"]["fc1.weight"] > 0
    # A second training knows which zeros were made.
    assert run(*teach[:-4], "-m", "tuned", "-o", "again", "--dry-run", "--json")["zero_layers"] == 2
    for folder, tag in (("sparse", "sparse"), ("tuned", "trained")):
        card = (tmp_path / folder / "README.md").read_text()
        assert f'tags: ["slimkit", "{tag}"]' in card
        assert "load_checkpoint" in card
    assert "slimkit train --model sparse" in card
    assert "--data labelled.npz" in card


@pytest.mark.parametrize("net", NETS)
def test_a_sparse_network_of_either_framework_becomes_a_w16a16s_folder(tmp_path, net):
    run("sparsify", *net, "--method", "magnitude", "-o", "sparse")
    asked = ("export", *net, "-m", "sparse", "--format", "w16a16s", "-o", "w")
    assert "config.json" in str(CliRunner().invoke(app, asked).exception)
    files.write_json(tmp_path / "sparse" / "config.json", {"model_type": "own"})
    assert set(run(*asked, "--json")["sparse"]) == {"fc1.weight", "fc2.weight"}
    assert json.loads((tmp_path / "w" / "config.json").read_text())["model_type"] == "own"


@pytest.mark.skipif("torch" not in INSTALLED, reason="Hugging Face folders")
def test_cards_of_hugging_face_folders_say_how_to_load_them(tmp_path):
    import transformers

    model = tiny_models.hugging_face(tmp_path, "llama", num_hidden_layers=2)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Old words\n")
    text = tiny_models.text(tmp_path / "t.jsonl", labels=False)
    data = ("--data", text, "--max-steps", 1, "--samples", 4)
    said = run("sparsify", "-m", model, "--method", "wanda", "--calib", text, "--samples", 4, "-o", "s")
    assert "Output error by block" in said
    assert f"Measure what it lost: slimkit compare {model} s --text" in said
    run("distill", "-m", model, "--layers", 1, *data, "--seed", 3, "-o", "d")
    run("train", "-m", "s", *data, "-o", "t")
    run("adapt", "-m", model, *data, "--format", "peft", "-o", "p")
    run("adapt", "-m", model, *data, "-o", "a")
    for folder, words in (
        (
            "s",
            (
                "slimkit sparsify --model llama --method wanda --calib",
                "--samples 4 --max-length 512 --batch-size 4",
                "largest output error of a layer",
            ),
        ),
        ("d", ("slimkit distill", "--samples 4 --max-length 128 --seed 3 --layers 1", "of the teacher's")),
        ("t", ("slimkit train --model s ", "--samples 4 --max-length 128", 'base_model: "llama"')),
        ("p", ("PeftModel.from_pretrained", "--samples 4 --max-length 128", "--format peft")),
        ("a", ("load_delta(model",)),
    ):
        card = (tmp_path / folder / "README.md").read_text()
        assert card.startswith('---\nlicense: "mit"\n'), folder
        assert "Old words" not in card
        assert all(word in card for word in words), (folder, card)
    for folder in ("s", "d", "t"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def test_yaml_reads_patterns_and_powers_as_people_mean_them():
    from slimkit.core.yamltext import parse_yaml

    read = parse_yaml(
        "{a: 2:4, b: 1e-2, c: 4:2, d: 12, e: -0.5, f: 1E5, g: .5, h: 0x10, i: 1.5e-3, j: x, k: 2024-01-02}"
    )
    assert (read["a"], read["b"], read["c"], read["d"], read["e"]) == ("2:4", 0.01, "4:2", 12, -0.5)
    assert (read["f"], read["g"], read["h"], read["i"], read["j"]) == (1e5, 0.5, 16, 0.0015, "x")
    assert run("run", "r.yaml", "--dry-run", "--json")["stages"] == ["sparsify"] if recipe() else True


def recipe():
    from pathlib import Path

    stage = "sparsify: {pattern: 2:4, method: magnitude}"
    return Path("r.yaml").write_text(f"version: 1\nname: r\nmodel: m.py:f\ndata: m.py:d\nstages:\n  - {stage}\n")


def test_paths_in_messages_are_plain(tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one")])
    assert "PosixPath" not in str(done.exception)
    assert str(tmp_path / "one") in str(done.exception)


@pytest.mark.skipif("torch" not in INSTALLED, reason="torch.save")
def test_whole_pickled_models_are_named_and_wrapped_names_are_taken(tmp_path):
    from slimkit import load_checkpoint
    from slimkit.core.errors import SlimkitError

    import torch
    from torch import nn

    net, fresh = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(SlimkitError, match=r"torch.save\(model.state_dict\(\)"):
        load_checkpoint(tmp_path / "whole.pt", fresh)
    for prefix in ("module.", "_orig_mod."):
        wrapped = {prefix + name: tensor for name, tensor in net.state_dict().items()}
        torch.save(wrapped, tmp_path / "ddp.pt")
        torch.nn.init.zeros_(fresh[0].weight)
        load_checkpoint(tmp_path / "ddp.pt", fresh, strict_load=True)
        assert torch.equal(fresh[0].weight, net[0].weight)
    files.write_json(tmp_path / "x.json", {})
