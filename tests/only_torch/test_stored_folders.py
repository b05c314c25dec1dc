"""Folders that transformers loads in a way of its own: what stays on disk is the model that it loads."""

from __future__ import annotations

import copy
import json

import pytest
from safetensors.torch import load_file, save_file

import slimkit
from slimkit import PruneTorch
from slimkit.core.errors import FileFormatError, UnsupportedError
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
