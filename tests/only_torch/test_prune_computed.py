"""What a model computes from its configuration: cut, replayed, loaded by the configuration, it is one model."""

from __future__ import annotations

import copy
import json

import pytest

import slimkit
from slimkit import PruneTorch
from slimkit.core.prune.merging import merge_desc
from tests.zoo import language

import torch

# Gemma scales its embeddings by the root of the hidden size (a buffer and a float), BioGPT by a float.
SCALED = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", language.LLAMA),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", language.BERT),
}
DECODER = dict(d_model=64, ffn_dim=128, num_layers=2, attention_heads=8, max_position_embeddings=40, **language.TEXT)
CTRL = {"n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 8, "n_positions": 40, "vocab_size": 96}
# Tables of positions by a formula, which no file holds: buffers, and Marian's, which are parameters left out of files.
TABLED = {
    "xglm": ("XGLMForCausalLM", "XGLMConfig", DECODER),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", CTRL),
    "marian": ("MarianMTModel", "MarianConfig", language.BART),
}  # fmt: skip


def built(name):
    import transformers

    model_class, config_class, fields = {**SCALED, **TABLED}[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    kept_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path not in kept_out and "embed_positions" not in path:
                parameter.mul_(3)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    return model.eval(), {"input_ids": ids, **({"decoder_input_ids": ids} if name == "marian" else {})}


@torch.no_grad()
def says(model, inputs):
    return model(**inputs).logits


def pruned(name, form, ratio=0.6):
    model, inputs = built(name)
    pruner = PruneTorch(model, inputs).set_alignment(8).set_form(form)
    desc = pruner.prune(ratio, None if form == "config" else [-1])
    return model, inputs, pruner, json.loads(json.dumps(desc))


def loaded_by_transformers(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", SCALED)
def test_every_way_to_a_cut_gives_the_scale_that_the_configuration_says(tmp_path, name):
    model, inputs, pruner, desc = pruned(name, "config")
    assert model.config.hidden_size < 64, "the test must cut the hidden width"
    wanted = says(model, inputs)
    assert pruner.report()["from_config"]["loads"]
    assert torch.equal(says(loaded_by_transformers(model, tmp_path / "hf"), inputs), wanted)
    slimkit.save_pruned(tmp_path / "own", model, desc)
    assert torch.equal(says(slimkit.load_pruned(tmp_path / "own", built(name)[0]), inputs), wanted)
    fresh = built(name)[0]
    assert torch.equal(says(PruneTorch(fresh).prune_by_desc(desc), inputs), wanted)
    # A plan of before these numbers were told.
    old = {key: value for key, value in desc.items() if key != "derived"}
    assert torch.equal(says(PruneTorch(built(name)[0]).prune_by_desc(old), inputs), wanted)
    dense = built(name)[0]
    assert slimkit.check_pruning(dense, inputs, desc).holds


def test_two_cuts_joined_end_at_the_last_scale(tmp_path):
    model, inputs, pruner, first = pruned("gemma", "config", 0.7)
    between = model.config.hidden_size
    second = PruneTorch(model, inputs).set_alignment(8).set_form("config").prune(0.45)
    assert model.config.hidden_size < between < 64
    joined = json.loads(json.dumps(merge_desc(first, second)))
    fresh = PruneTorch(built("gemma")[0]).prune_by_desc(joined)
    assert torch.equal(says(fresh, inputs), says(model, inputs))
    assert float(fresh.model.embed_tokens.embed_scale) == pytest.approx(model.config.hidden_size**0.5)
    slimkit.save_pruned(tmp_path / "own", model, pruner.whole_desc())
    assert torch.equal(says(slimkit.load_pruned(tmp_path / "own", built("gemma")[0]), inputs), says(model, inputs))


@pytest.mark.parametrize("name", SCALED)
def test_a_free_cut_keeps_its_scale_and_is_not_said_to_load_by_its_configuration(name):
    model, inputs, pruner, desc = pruned(name, "any")
    assert model.get_input_embeddings().weight.shape[1] < 64
    assert not pruner.report()["from_config"]["loads"]
    assert slimkit.check_pruning(built(name)[0], inputs, desc).holds


def test_a_free_cut_whose_shapes_the_configuration_says_is_told_by_its_scale():
    model, inputs = built("gemma")
    pruner = PruneTorch(model, inputs).set_alignment(8).set_form("config")
    _, desc = pruner.analysis(0.6)
    # The same cut without the promise: the scale stays.
    free = {**{k: v for k, v in desc.items() if k != "derived"}, "made": {**desc["made"], "form": "any"}}
    replayed = PruneTorch(copy.deepcopy(model), inputs)
    replayed.prune_by_desc(free)
    told = replayed.report()["from_config"]
    assert not told["loads"]
    assert "scale is 8" in told["because"]


@pytest.mark.parametrize("name", TABLED)
@pytest.mark.parametrize("form", ["config", "padded"])
def test_a_width_of_computed_tables_stays_whole_where_they_would_come_back_otherwise(tmp_path, name, form):
    model, inputs, pruner, _ = pruned(name, form, 0.7)
    assert model.get_input_embeddings().weight.shape[1] == 64
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in built(name)[0].parameters())
    report = pruner.report()
    assert report["from_config"]["loads"]
    assert any("computed anew" in note for note in report["notes"])
    assert torch.equal(says(loaded_by_transformers(model, tmp_path), inputs), says(model, inputs))


@pytest.mark.parametrize("name", TABLED)
def test_a_free_cut_of_computed_tables_is_not_said_to_load_by_its_configuration(tmp_path, name):
    model, inputs, pruner, desc = pruned(name, "any")
    assert model.get_input_embeddings().weight.shape[1] < 64
    assert not pruner.report()["from_config"]["loads"]
    slimkit.save_pruned(tmp_path, model, desc)
    assert torch.equal(says(slimkit.load_pruned(tmp_path, built(name)[0]), inputs), says(model, inputs))


def test_numbers_of_heads_that_only_the_making_of_a_model_reads_follow_too(tmp_path):
    import transformers

    config = transformers.XLMConfig(vocab_size=96, emb_dim=64, n_layers=2, n_heads=8, max_position_embeddings=40)
    model = transformers.XLMWithLMHeadModel(config).eval()
    ids = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    job = PruneTorch(model, ids).set_alignment(8).set_importance_evaluation_function("l1")
    desc = job.prune(0.7, [])
    assert model.transformer.n_heads == model.config.n_heads < 8
    assert job.report()["from_config"]["loads"]
    assert job.report()["notes"] == [
        f"asked to keep 0.700, keeps {job.report()['reached']:.3f}: the widths that alignment and heads allow lie too "
        "far apart to come nearer"
    ]
    model.save_pretrained(tmp_path / "hf")
    again = transformers.XLMWithLMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(**ids).logits, model(**ids).logits)
    fresh = transformers.XLMWithLMHeadModel(transformers.XLMConfig(**{**config.to_dict(), "emb_dim": 64, "n_heads": 8}))
    slimkit.save_pruned(tmp_path / "own", model, desc)
    slimkit.load_pruned(tmp_path / "own", fresh)
    assert fresh.transformer.n_heads == model.config.n_heads
