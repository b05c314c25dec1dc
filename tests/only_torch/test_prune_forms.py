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
from slimkit.core.prune.serving import serves
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
# A process that has no slimkit.
ALONE = """
import json, sys
import torch, transformers
folder, loader = sys.argv[1:]
model = getattr(transformers, loader).from_pretrained(folder).eval()
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
torch.save(model(**inputs).logits, folder + "/alone.pt")
assert not [name for name in sys.modules if name.startswith("slimkit")]
"""
ALL = """
import json, sys
import torch, transformers
folder, loaders = sys.argv[1], json.loads(sys.argv[2])
for name, loader in loaders.items():
    model = getattr(transformers, loader).from_pretrained(f"{folder}/{name}").eval()
    held = torch.load(f"{folder}/{name}.pt", weights_only=True)
    assert type(model).__name__ == held["kind"]
    with torch.no_grad():
        found = model(**held["inputs"]).logits
        torch.testing.assert_close(found, held["output"], atol=1e-5, rtol=0)  # float32
        if held["said"] is not None:
            given = {k: v for k, v in held["inputs"].items() if k != "decoder_input_ids"}
            said = model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=True)
            assert torch.equal(said, held["said"]), name
    print(name)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("forms")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_is_one_that_the_configuration_says(name, folder):
    _, fields = FAMILIES[name]
    model, inputs = built(name)
    job = oracle.pruner(model, inputs)
    desc = job.prune(0.6)
    report = job.report()
    assert report["form"] == {"name": "config", "because": ""}
    assert abs(report["reached"] - 0.6) <= 0.02
    assert fields <= desc["config"].keys()
    assert report["serves"]["transformers"]["meets"]
    model.save_pretrained(folder / name)
    with torch.no_grad():
        held = {"inputs": inputs, "output": oracle.call(model, inputs), "said": answers(model, inputs)}
    torch.save({"kind": type(model).__name__, **held}, folder / f"{name}.pt")


def test_a_process_without_slimkit_loads_them_all_and_answers_alike(folder):
    for name in FAMILIES:
        if not (folder / f"{name}.pt").exists():
            test_a_cut_is_one_that_the_configuration_says(name, folder)
    loaders = json.dumps({name: loader for name, (loader, _) in FAMILIES.items()})
    call = [sys.executable, "-I", "-c", ALL, folder, loaders]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == list(FAMILIES)


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


def test_every_tower_is_held_to_the_limits():
    """A configuration inside another one, and fields beside the first that is known, were not looked at."""
    towers = {"text_config.num_attention_heads": 4, "vision_config.num_attention_heads": 6}
    assert serves("CLIPModel", towers, "", 4)["vllm"]["because"] == ["6 heads do not divide among 4 devices"]
    moe = {"num_attention_heads": 8, "intermediate_size": 64, "moe_intermediate_size": 36}
    told = serves("Qwen2MoeForCausalLM", {**moe, "shared_expert_intermediate_size": 60}, "", 8)["vllm"]["because"]
    assert told == [f"an inner width of {n} does not divide among 8 devices" for n in (36, 60)]
    unset = {"n_embd": 36, "n_head": 4, "n_inner": None}
    told = serves("GPT2LMHeadModel", unset, "", 32)["vllm"]["because"]
    assert "an inner width of 144 does not divide among 32 devices" in told


def test_a_vocabulary_that_devices_do_not_divide_is_told():
    for number in (64, 8):  # of 96 tokens; 64 devices share 8 heads, and divide an inner width of 128
        model, inputs = language.build("t5")
        job = oracle.pruner(model, inputs).set_parallel(number)
        job.analysis(0.8)
        assert any("vocab_size 96" in note for note in job.report()["notes"]) is (number == 64)


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


@pytest.mark.parametrize("form", ["config", "padded"])
def test_a_measured_cut_gives_up_heads_and_not_the_hidden_width_that_they_must_divide(form):
    """Seven of eight heads divide no width of 64: features went for them, which no loss had been foretold of."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_key_value_heads": 1})).eval()
    with torch.no_grad():
        for block in model.model.layers:  # a head that says nothing, so that it is the first to go
            block.self_attn.o_proj.weight[:, :8] = 0
    chance = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 90, (4, 12), generator=chance)} for _ in range(2)]
    job = PruneTorch(model, {"input_ids": batches[0]["input_ids"][:1]}).set_alignment(4).set_form(form)
    desc = job.set_importance_evaluation_function("auto", calibration=batches).prune(0.75, [])
    assert desc["made"]["foretold_loss"] is not None
    assert model.config.hidden_size == 64
    assert model.config.num_attention_heads in (4, 8)
    kept = [v["keep"] for v in job.report()["variables"].values() if v["kind"] == "heads"]
    assert all(k == model.config.num_attention_heads if form == "config" else k < 8 for k in kept)
    assert job.report()["from_config"]["loads"]


def test_an_inner_width_that_is_unset_is_a_number_of_its_own():
    import transformers

    sizes = dict(hidden_size=64, num_layers=2, num_heads=8, attention_types=[[["global", "local"], 1]], **language.TEXT)
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(max_position_embeddings=40, **sizes)).eval()
    job = PruneTorch(model, {"input_ids": torch.ones(1, 7, dtype=torch.long)}).set_alignment(4)
    desc = job.prune(0.75, ["*.out_proj"])
    assert desc["config"].keys() == {"intermediate_size"}
    assert abs(job.report()["reached"] - 0.75) < 0.01
    assert job.report()["from_config"]["loads"]
