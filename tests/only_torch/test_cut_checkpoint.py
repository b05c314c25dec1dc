"""Smaller transformers cut out of folders: equal to `prune_model_weight`, and to the same bytes after a kill."""

from __future__ import annotations

from functools import partial

import pytest

from slimkit.core.errors import ArgumentTypeError, ConfigError, PlanError, UnsupportedError
from slimkit.core.weights.blocks import PruneConfig
from tests.kills import killed_at
from tests.only_torch.test_merge_checkpoint import digests

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, INTRA = "prune_blocks", "prune_bert_intra_block"
LAYERS = r"layers.(\d+)."


def llama(dtype=torch.float32, **more):
    import transformers as hf

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "head_dim": 8,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **more})).to(dtype)


def steps(*names):
    return PruneConfig().set_steps(list(names))


CASES = {
    "blocks": (
        {"num_hidden_layers": 2},
        lambda: steps(BLOCKS).add_blocks_params(LAYERS, {0: 0, 1: 2}),
        {},
        "20KB",
    ),
    "importance": (
        {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        lambda: steps(INTRA).set_selection("importance"),
        {"dtype": torch.bfloat16, "tie_word_embeddings": True},
        "10GB",
    ),
    "both": (
        {"num_hidden_layers": 1, "hidden_size": 24},
        lambda: steps(BLOCKS, INTRA).add_blocks_params(LAYERS, {0: 1}),
        {},
        "20KB",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_cut_to_what_the_model_in_memory_gets(case, tmp_path):
    from slimkit import cut_checkpoint, prune_model_weight

    import transformers as hf

    fields, config, made, size = CASES[case]
    llama(**made).save_pretrained(tmp_path / "large", max_shard_size=size)
    (tmp_path / "large" / "tokenizer.json").write_text("{}")
    report = cut_checkpoint(tmp_path / "large", tmp_path / "small", fields, config())
    wanted = llama(**{**made, **fields})
    told = prune_model_weight(wanted, config(), tmp_path / "large")
    assert {k: v for k, v in report.items() if k != "bytes"} == dict(told)
    got, told = hf.LlamaForCausalLM.from_pretrained(tmp_path / "small", dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    here, there = wanted.state_dict(), got.state_dict()
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype
        assert torch.equal(here[name], there[name]), name
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_a_killed_cut_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    from slimkit import cut_checkpoint
    from slimkit.core.checkpoint import stepwise

    llama().save_pretrained(tmp_path / "large")
    monkeypatch.setattr(stepwise.shared_out, "__defaults__", (20_000,))
    config = steps(BLOCKS).add_blocks_params(LAYERS, {0: 0, 1: 2})

    def work(place):
        cut_checkpoint(tmp_path / "large", place, {"num_hidden_layers": 2}, config)

    work(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    assert "model.safetensors.index.json" in wanted
    turn = 1
    while killed_at(turn, partial(work, tmp_path / f"k{turn}")):
        work(tmp_path / f"k{turn}")
        assert digests(tmp_path / f"k{turn}") == wanted
        turn += 7
    assert turn > 20


def test_what_cannot_be_cut_is_refused_and_leaves_nothing(tmp_path):
    from slimkit import cut_checkpoint

    llama().save_pretrained(tmp_path / "large")
    large, out = tmp_path / "large", tmp_path / "out"
    config = steps(BLOCKS).add_blocks_params(LAYERS, {0: 0, 1: 2})
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        cut_checkpoint(large, out, {"num_hiden_layers": 2}, config)
    with pytest.raises(PlanError, match="no tensor in the file"):
        cut_checkpoint(large, out, {"num_hidden_layers": 2, "attention_bias": True}, config, strict=False)
    with pytest.raises(PlanError, match="prune_bert_intra_block"):
        cut_checkpoint(large, out, {"num_hidden_layers": 2, "intermediate_size": 32}, config)
    with pytest.raises(ArgumentTypeError, match="fields"):
        cut_checkpoint(large, out, ["num_hidden_layers"], config)
    assert not out.exists()
    fields = {"num_hidden_layers": 2, "id2label": {0: "a", 1: "b"}}
    report = cut_checkpoint(large, out, fields, config)
    again = cut_checkpoint(large, out, fields, config)
    assert again["bytes"]["written"] == 0
    assert {**again, "bytes": report["bytes"]} == report  # whose keys JSON makes text
    with pytest.raises(UnsupportedError, match="fields"):
        cut_checkpoint(large, out, {"num_hidden_layers": 1}, steps(BLOCKS).add_blocks_params(LAYERS, {0: 0}))


def test_tables_that_differ_are_not_made_one_in_silence(tmp_path):
    import json

    import slimkit

    llama().save_pretrained(tmp_path / "src")
    told = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": True}))
    config = PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(r"layers\.(\d+)\.", {0: 0})
    with pytest.raises(PlanError, match="different values, and the model ties them"):
        slimkit.cut_checkpoint(tmp_path / "src", tmp_path / "dst", {"num_hidden_layers": 1}, config)
    report = slimkit.cut_checkpoint(
        tmp_path / "src", tmp_path / "loose", {"num_hidden_layers": 1}, config, strict=False
    )
    assert report["unused"] == ["lm_head.weight"]
    fields = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    whole = slimkit.cut_checkpoint(tmp_path / "src", tmp_path / "dst", fields, config)
    assert not whole["unused"]
