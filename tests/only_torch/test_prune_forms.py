"""Cuts that a configuration can say: what is saved loads with transformers alone and answers alike."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from slimkit import PruneTorch
from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.jobs.fields import words_of
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.prune.forms import FORMS
from tests.zoo import language, oracle

import torch
from torch import nn

LLAMA, IDS = language.LLAMA, language.IDS
OWN = {
    "qwen3moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        dict(LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32), IDS,
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {
        "vision_config": dict(language.VIT, projection_dim=32),
        "text_config": dict(language.BERT, projection_dim=32),
    }, language.PIX),
}  # fmt: skip
# family -> the loader of transformers that a user calls, and the fields that a cut to .6 must rewrite
FAMILIES = {
    "bert": ("AutoModelForSequenceClassification", {"hidden_size", "num_attention_heads", "intermediate_size"}),
    "gpt2": ("AutoModelForCausalLM", {"n_embd", "n_head", "n_inner"}),
    "opt": ("AutoModelForCausalLM", {"hidden_size", "word_embed_proj_dim", "num_attention_heads", "ffn_dim"}),
    "llama": ("AutoModelForCausalLM", {"hidden_size", "num_attention_heads", "num_key_value_heads"}),
    "qwen2": ("AutoModelForCausalLM", {"hidden_size", "num_attention_heads", "num_key_value_heads"}),
    "qwen3": ("AutoModelForCausalLM", {"hidden_size", "num_attention_heads", "num_key_value_heads"}),
    "qwen3moe": ("AutoModelForCausalLM", {"hidden_size", "num_attention_heads", "moe_intermediate_size"}),
    "mixtral": ("AutoModelForCausalLM", {"hidden_size", "num_attention_heads", "intermediate_size"}),
    "t5": ("AutoModelForSeq2SeqLM", {"d_model", "d_ff"}),
    "whisper": ("AutoModelForSpeechSeq2Seq", {"d_model", "encoder_ffn_dim", "decoder_attention_heads"}),
    "clip": ("AutoModelForImageClassification", {"vision_config.hidden_size", "vision_config.num_attention_heads"}),
    "vit": ("AutoModelForImageClassification", {"hidden_size", "num_attention_heads", "intermediate_size"}),
    "swin": ("AutoModelForImageClassification", {"mlp_ratio"}),
    "wav2vec2": ("AutoModelForCTC", {"hidden_size", "num_attention_heads", "conv_dim"}),
}
# One process loads what these leave behind, and has no slimkit.
APART = ("bert", "qwen3moe", "swin")
ALONE = """
import json, sys
import torch, transformers
folder, loader = sys.argv[1:]
model = getattr(transformers, loader).from_pretrained(folder).eval()
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
torch.save(model(**inputs).logits, folder + "/alone.pt")
assert not [name for name in sys.modules if name.startswith("slimkit")]
"""


def built(name):
    if name in OWN:
        language.MORE.setdefault("_forms_" + name, OWN[name])
        try:
            return language.build("_forms_" + name)
        finally:
            del language.MORE["_forms_" + name]
    return language.build(name)


def answers(model, inputs):
    """Tokens that a model generates with its cache; None where it generates none."""
    if not model.can_generate():
        return None
    given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_model_loads_without_slimkit_and_answers_alike(name, tmp_path):
    import transformers

    loader, fields = FAMILIES[name]
    model, inputs = built(name)
    job = oracle.pruner(model, inputs)
    desc = job.prune(0.6)
    report = job.report()
    assert report["form"] == {"name": "config", "because": ""}
    assert abs(report["reached"] - 0.6) <= 0.02
    assert fields <= desc["config"].keys()
    assert report["serves"]["transformers"]["meets"]
    model.save_pretrained(tmp_path)
    again = getattr(transformers, loader).from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        mine = oracle.call(model, inputs)
        assert torch.allclose(oracle.call(again, inputs), mine, atol=1e-5, rtol=0)
        said = answers(model, inputs)
        assert said is None or torch.equal(answers(again, inputs), said)
    if name in APART:
        torch.save(inputs, tmp_path / "inputs.pt")
        subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path, loader], check=True, cwd=tmp_path)
        assert torch.allclose(torch.load(tmp_path / "alone.pt"), mine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*language.MODELS, "bloom", "falcon", "xlnet", "deberta", "gemma2", "deepseek3"])
def test_a_configuration_says_the_cut_or_the_report_says_why_not(name):
    """Whatever the family: no table of ours names it."""
    model, inputs = language.build(name)
    job = oracle.pruner(model, inputs)
    job.prune(0.8)
    report = job.report()
    assert report["form"]["name"] == "config" or report["form"]["because"]
    assert report["from_config"]["loads"] is (report["form"]["name"] == "config")


def test_a_head_keeps_its_size_where_code_divides_by_the_number_of_heads():
    for name in ("bert", "vit", "gpt2", "opt", "wav2vec2"):
        model, inputs = language.build(name)
        before = model.config.hidden_size // model.config.num_attention_heads
        oracle.pruner(model, inputs).prune(0.6)
        assert model.config.hidden_size == before * model.config.num_attention_heads
    model, inputs = language.build("t5")
    oracle.pruner(model, inputs, ratio_floor=0.1).prune(0.4)
    assert model.config.d_kv == 8
    assert model.config.num_heads < 8


def test_stages_shrink_together():
    model, inputs = language.build("swin")
    job = PruneTorch(model, inputs).set_alignment(1)
    job.prune(0.3)
    config = model.config
    assert config.embed_dim < 32
    assert [8 * n for n in config.num_heads] == [config.embed_dim, 2 * config.embed_dim]


def test_one_that_no_configuration_can_say_is_refused_by_name_and_cut_by_default():
    model, inputs = language.build("mobilenet_v1")
    job = oracle.pruner(model, inputs)
    with pytest.raises(UnsupportedError, match=r"MobileNetV1ForImageClassification's configuration.*Only form 'any'"):
        job.set_form("config").prune(0.6)
    plain = PruneTorch(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.ones(1, 8))
    with pytest.raises(UnsupportedError, match="no configuration of Hugging Face"):
        plain.set_form("config").prune(0.6)
    with pytest.raises(ArgumentError, match="form"):
        plain.set_form("round")
    assert plain.set_form("any").analysis(0.6)[1]["made"]["form"] == "any"


def test_the_command_knows_the_forms():
    assert words_of(PruneOptions, "form").words == tuple(FORMS)


def test_devices_divide_what_is_left():
    model, inputs = language.build("llama")
    job = oracle.pruner(model, inputs, ratio_floor=0.1).set_parallel(2)
    job.prune(0.5)
    config = model.config
    assert config.num_attention_heads == 4
    assert config.num_key_value_heads == 2
    assert config.intermediate_size % 2 == 0
    assert not [x for x in job.report()["serves"]["vllm"]["because"] if "devices" in x]
    # More devices than key and value heads: those stay, and are shared.
    model, inputs = language.build("llama")
    oracle.pruner(model, inputs, ratio_floor=0.1).set_parallel(8).prune(0.7)
    assert model.config.num_key_value_heads == 4
    with pytest.raises(ArgumentError, match=r"attention\.self\.query.*no more heads\. Received: 3"):
        oracle.pruner(*language.build("pvt")).set_parallel(3).prune(0.5)


def test_limits_are_stated_with_their_sources():
    model, inputs = language.build("llama")
    job = oracle.pruner(model, inputs)
    job.prune(0.6)
    found = json.loads(json.dumps(job.report()["serves"]))
    assert found["vllm"]["because"] == ["FlashAttention takes no heads of 8 (FlexAttention does)"]
    assert all(source.startswith("https://") for x in ("vllm", "vllm_ascend") for source in found[x]["sources"])


def test_global_allocation_turns_levers_too():
    model, inputs = language.build("bert")
    job = oracle.pruner(model, inputs).set_allocation("global")
    job.prune(0.6)
    assert job.report()["from_config"]["loads"]
    assert abs(job.report()["reached"] - 0.6) <= 0.02


def test_the_default_limit_gives_way_and_a_floor_stays():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    job = PruneTorch(net(), torch.ones(1, 8)).set_alignment(1)
    job.prune(0.1, [])
    assert abs(job.report()["reached"] - 0.1) <= 0.01
    job = PruneTorch(net(), torch.ones(1, 8)).set_alignment(1).set_node_reserved_ratio(0.5)
    job.prune(0.1, [])
    assert job.report()["reached"] > 0.25
    assert [x["keeps"] for x in job.report()["held_back"]] == [32, 32]
