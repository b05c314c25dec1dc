"""Deltas merged into folders: equal to the whole model's merge, resumed to the same bytes, refused by name."""

from __future__ import annotations

import copy
import hashlib
from functools import partial

import pytest

from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.locks import SHARDS
from tests.kills import killed_at

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(dtype=torch.float32, **more):
    import transformers as hf

    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **more)).to(dtype)


def t5():
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


def mixtral():
    import transformers as hf

    torch.manual_seed(0)
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **SMALL))


def trained(model, kind, targets, folder, **options):
    """A delta's folder, its values drawn at random."""
    from slimkit import apply_delta, save_delta

    twin = copy.deepcopy(model)
    apply_delta(twin, kind, targets, **options)
    for name, value in twin.named_parameters():
        if "mindpet_delta" in name:
            torch.nn.init.normal_(value)
    save_delta(twin, folder)


def peft_trained(model, folder, targets=("q_proj",), **options):
    import peft

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=list(targets), **options))
    for value in wrapped.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value)
    wrapped.save_pretrained(folder)


def in_memory(kind, base, delta):
    from slimkit import load_delta, merge_delta

    whole = kind.from_pretrained(base, dtype="auto")
    load_delta(whole, delta)
    merge_delta(whole, unload=True)
    return whole


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()}


CASES = {
    "lora": (llama, lambda m, d: trained(m, "lora", ["*q_proj", "*down_proj"], d, rank=3)),
    "lora-bf16": (lambda: llama(torch.bfloat16), lambda m, d: trained(m, "lora", ["*q_proj"], d, rank=3)),
    "lora-on-int8": (
        lambda: llama(torch.bfloat16),
        lambda m, d: trained(m, "lora", ["*q_proj", "*down_proj"], d, rank=3, base_dtype="int8"),
    ),
    "lora-on-bf16": (llama, lambda m, d: trained(m, "lora", ["*q_proj"], d, rank=3, base_dtype="bfloat16")),
    "miss": (llama, lambda m, d: trained(m, "miss", ["*k_proj", "*down_proj"], d, rank=4)),
    "shira": (llama, lambda m, d: trained(m, "shira", ["*k_proj", "*down_proj"], d, rank=2)),
    "ia3": (
        lambda: llama(attention_bias=True),
        lambda m, d: trained(m, "ia3", ["*k_proj", "*down_proj"], d, feedforward=["*down_proj"]),
    ),
    "experts": (mixtral, lambda m, d: trained(m, "lora", ["*experts", "*o_proj"], d, rank=3)),
    "peft-dora-head": (llama, lambda m, d: peft_trained(m, d, use_dora=True, modules_to_save=["lm_head"])),
    "peft-untied": (
        lambda: llama(tie_word_embeddings=True),
        lambda m, d: peft_trained(m, d, modules_to_save=["lm_head"]),
    ),
    # The table trained, and what the base holds under its name alone goes on as the head.
    "peft-table-untied": (
        lambda: llama(tie_word_embeddings=True),
        lambda m, d: peft_trained(m, d, modules_to_save=["embed_tokens"]),
    ),
    "peft-table-of-three": (t5, lambda m, d: peft_trained(m, d, ["q"], modules_to_save=["shared"])),
    "peft-pissa": (llama, lambda m, d: peft_trained(m, d, init_lora_weights="pissa_niter_4")),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_merges_to_what_the_whole_model_merges_to(case, tmp_path):
    from slimkit import merge_checkpoint

    make, train = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    train(model, tmp_path / "delta")
    before = digests(tmp_path / "base")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert report["merged"]
    assert report["copied"]
    assert digests(tmp_path / "base") == before
    wanted = in_memory(type(model), tmp_path / "base", tmp_path / "delta")
    got, told = type(model).from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    # T5's configuration says True whatever the file says.
    assert got.config.tie_word_embeddings == wanted.config.tie_word_embeddings or type(model).__name__[:2] == "T5"
    here, there = wanted.state_dict(), got.state_dict()
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype
        assert torch.equal(here[name], there[name]), name


def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path):
    from slimkit import merge_checkpoint

    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    trained(model, "lora", ["*q_proj"], tmp_path / "delta", rank=2)

    def work(folder):
        merge_checkpoint(tmp_path / "base", tmp_path / "delta", folder)

    work(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    turn = 1
    while killed_at(turn, partial(work, tmp_path / f"k{turn}")):
        part = tmp_path / f"k{turn}"
        # Nothing can be loaded before all of it is there.
        loads = (part / "config.json").exists() and (part / "model.safetensors.index.json").exists()
        assert not loads or digests(part) == wanted
        work(part)
        assert digests(part) == wanted
        turn += 4
    assert turn > 20


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path):
    from slimkit import merge_checkpoint

    model = llama()
    model.save_pretrained(tmp_path / "base")
    trained(model, "adapter", ["*down_proj"], tmp_path / "adapter", bottleneck_size=4)
    trained(model, "lora", ["*q_proj"], tmp_path / "lora", rank=2)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="can be merged"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", out)
    with pytest.raises(FileFormatError, match="delta"):
        merge_checkpoint(tmp_path / "base", tmp_path / "nowhere", out)
    with pytest.raises(ArgumentError, match="another directory"):
        merge_checkpoint(tmp_path / "base", tmp_path / "lora", tmp_path / "base")
    with pytest.raises(FileFormatError):
        merge_checkpoint(tmp_path / "lora", tmp_path / "lora", out)
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    peft_trained(tied, tmp_path / "both", ["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight is adapted"):
        merge_checkpoint(tmp_path / "tied", tmp_path / "both", out)
    assert not out.exists()
    merge_checkpoint(tmp_path / "base", tmp_path / "lora", out)
    assert (out / SHARDS / "job.json").exists()
    trained(model, "lora", ["*k_proj"], tmp_path / "lora2", rank=2)
    with pytest.raises(UnsupportedError, match="begun with another"):
        merge_checkpoint(tmp_path / "base", tmp_path / "lora2", out)


def test_the_command_merges_and_replaces_only_what_is_whole(tmp_path):
    from typer.testing import CliRunner

    from slimkit.cli import app

    model = llama()
    model.save_pretrained(tmp_path / "base")
    trained(model, "lora", ["*q_proj"], tmp_path / "lora", rank=2)
    words = ["export", "-m", str(tmp_path / "base"), "--format", "hf", "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code
    assert "--delta" in str(refused.exception)
    words += ["--delta", str(tmp_path / "lora")]
    assert "would write" in CliRunner().invoke(app, [*words, "--dry-run"]).output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    made = digests(tmp_path / "out")
    assert "model.safetensors" in made
    assert not (tmp_path / "out" / SHARDS).exists()
    assert CliRunner().invoke(app, words).exit_code
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    assert digests(tmp_path / "out") == made
