"""Folders that transformers loads in a way of its own: what stays on disk is the model that it loads."""

from __future__ import annotations

import copy
import json
import os

import pytest
from safetensors.torch import load_file, save_file

import slimkit
from slimkit import PruneTorch, SparseConfig
from slimkit.core.checkpoint import stepwise
from slimkit.core.errors import FileFormatError, UnsupportedError
from slimkit.core.sparse import folderwalk
from slimkit.core.weights.blocks import PruneConfig
from slimkit.stored import StoredModel
from tests.zoo import language

import torch


@pytest.fixture
def folder(tmp_path):
    model, inputs = language.build("llama")
    model.save_pretrained(tmp_path / "src")
    return tmp_path / "src", model, inputs


def change(folder, edit):
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def loaded(folder):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_tables_that_the_configuration_ties_and_the_files_do_not(tmp_path, folder):
    source, _, inputs = folder
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))
    dense = loaded(source)
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight, "transformers no longer parts them"
    stored = StoredModel(source)
    for name, value in dense.state_dict().items():
        assert torch.equal(stored.value(name), value), name
    data = [{"input_ids": inputs["input_ids"]}]
    small = copy.deepcopy(dense)
    pruner = PruneTorch(small, inputs).set_alignment(8)
    pruner.set_importance_evaluation_function("output", calibration=data)
    pruner.prune(0.7)
    report = slimkit.prune_checkpoint(
        source, tmp_path / "dst", 0.7, alignment=8, importance="output", calibration=data, inputs=inputs
    )
    assert report["parameters"] == sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(loaded(tmp_path / "dst")(**inputs).logits, small(**inputs).logits)


def test_equal_tables_stay_tied(folder):
    source, _, _ = folder
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))
    change(source, lambda held: {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()})
    model = StoredModel(source).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_without_a_place_in_the_model_are_told(tmp_path, folder):
    source, _, _ = folder
    change(source, lambda held: {**held, "score.weight": torch.ones(3, 64)})
    report = slimkit.prune_checkpoint(source, tmp_path / "dst", 0.7)
    assert [n for n in report["report"]["notes"] if "score.weight" in n and "stay whole" in n]
    assert load_file(tmp_path / "dst" / "model.safetensors")["score.weight"].shape == (3, 64)


def test_one_parameter_under_two_names_is_refused(tmp_path, folder):
    source, _, _ = folder
    change(source, lambda held: {**held, "norm.weight": held["model.norm.weight"] + 1})
    with pytest.raises(FileFormatError, match=r"'norm\.weight' and as 'model\.norm\.weight'"):
        slimkit.prune_checkpoint(source, tmp_path / "dst", 0.7)
    assert not (tmp_path / "dst").exists()


def test_eight_bit_floats_are_named(tmp_path, folder):
    source, _, _ = folder
    name = "model.layers.0.mlp.up_proj.weight"
    change(source, lambda held: {**held, name: held[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        slimkit.prune_checkpoint(source, tmp_path / "dst", 0.7)


JOBS = {
    "prune": lambda source, out: slimkit.prune_checkpoint(source, out, 0.7),
    "cut": lambda source, out: slimkit.cut_checkpoint(source, out, {"num_hidden_layers": 2}, FIRST),
    "sparsify": lambda source, out: slimkit.sparsify_checkpoint(source, out, SparseConfig(method="magnitude"), None),
}
FIRST = PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(r"layers.(\d+).", {0: 0, 1: 1})


@pytest.mark.parametrize("job", ["prune", "sparsify"])
def test_a_configuration_of_another_model_is_named(tmp_path, folder, job):
    source, _, _ = folder
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**told, "intermediate_size": told["intermediate_size"] // 2}))
    with pytest.raises(FileFormatError, match=r"mlp\..*and config\.json beside it makes it"):
        JOBS[job](source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("index", ["[1]", '{"weight_map": 3}', "{"])
def test_a_damaged_index_is_named(tmp_path, folder, index):
    source, _, _ = folder
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text(index)
    for job in JOBS.values():
        with pytest.raises(FileFormatError, match=r"index\.json"):
            job(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_tensor_of_more_bytes_than_its_shape_is_named(tmp_path, folder):
    source, _, _ = folder
    file = source / "model.safetensors"
    raw = file.read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    entries["model.norm.weight"]["shape"] = [entries["model.norm.weight"]["shape"][0] - 1]
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + int.from_bytes(raw[:8], "little") :])
    with pytest.raises(FileFormatError, match=r"'model\.norm\.weight' has"):
        slimkit.prune_checkpoint(source, tmp_path / "dst", 0.7)


@pytest.mark.parametrize("job", JOBS)
def test_files_that_change_while_they_are_read_are_not_mixed(tmp_path, folder, job, monkeypatch):
    source, _, _ = folder
    touch = lambda: os.utime(source / "model.safetensors", ns=(1, 1))
    room, name = (folderwalk, "compress") if job == "sparsify" else (stepwise, "write_index")
    inner = getattr(room, name)
    monkeypatch.setattr(room, name, lambda *arguments: (touch(), inner(*arguments))[1])
    with pytest.raises(FileFormatError, match="was changed while it was read"):
        JOBS[job](source, tmp_path / "dst")
    assert not (tmp_path / "dst" / "config.json").exists()


def test_an_index_of_files_that_are_not_written_is_not_copied(tmp_path, folder):
    source, _, _ = folder
    for name in ("pytorch_model.bin", "model.gguf"):
        (source / name).write_bytes(b"other weights")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    (source / "tokenizer.json").write_text("{}")
    for name, job in JOBS.items():
        job(source, tmp_path / name)
        found = {file.name for file in (tmp_path / name).iterdir() if file.is_file()}
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= found
        assert not {"pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json"} & found, name
