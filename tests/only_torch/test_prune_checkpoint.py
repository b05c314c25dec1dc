"""Folders pruned tensor by tensor: equal to the whole model's pruning, resumed to the same bytes, refused by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from slimkit.core.errors import ArgumentError, ConfigError, FileFormatError, UnsupportedError
from slimkit.core.locks import SHARDS
from tests.kills import killed_at
from tests.only_torch.test_merge_checkpoint import digests

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
KV = {"num_key_value_heads": 2, **SMALL}


def build(family):
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**KV))
    if family == "llama-bf16-tied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=True, **KV)).to(torch.bfloat16)
    if family == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **KV))
    if family == "gemma":  # scales its embeddings by what its configuration says
        return hf.GemmaForCausalLM(hf.GemmaConfig(head_dim=8, **KV))
    if family == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**SMALL))
    gpt2 = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)
    return hf.GPT2LMHeadModel(gpt2)


def folder(family, place, size="20KB"):
    model = build(family)
    model.save_pretrained(place, max_shard_size=size)
    (place / "tokenizer.json").write_text("{}")
    return type(model)


def in_memory(kind, place, ratio, importance="l1", alignment=8, allocation=None):
    from slimkit import PruneTorch

    model = kind.from_pretrained(place, dtype="auto")
    pruner = PruneTorch(model).set_importance_evaluation_function(importance).set_alignment(alignment)
    if allocation:
        pruner.set_allocation(allocation)
    return model, pruner.prune(ratio)


CASES = {
    "llama": {},
    "llama-bf16-tied": {"importance": "lamp", "allocation": "global", "alignment": 4},
    "mixtral": {},
    "gemma": {"importance": "random"},
    "bert": {"importance": "l2"},
    "gpt2": {},
}


@pytest.mark.parametrize("family", CASES)
def test_a_folder_is_pruned_to_what_the_whole_model_is(family, tmp_path):
    from slimkit import prune_checkpoint

    options = {"importance": "l1", "alignment": 8, **CASES[family]}
    kind = folder(family, tmp_path / "base")
    report = prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, **options)
    wanted, desc = in_memory(kind, tmp_path / "base", 0.7, **options)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == json.loads(json.dumps(desc))
    got, told = kind.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    here, there = wanted.state_dict(), got.state_dict()
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype
        assert torch.equal(here[name], there[name]), name
    assert report["parameters"] == sum(p.numel() for p in wanted.parameters()) < report["parameters_before"]
    wanted.save_pretrained(tmp_path / "saved")
    config = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("saved", "out")]
    assert config[0] == config[1]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    index = tmp_path / "out" / "model.safetensors.index.json"
    sizes = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < json.loads(index.read_text())["metadata"]["total_size"] < sizes


def test_a_killed_pruning_goes_on_to_the_same_bytes(tmp_path):
    from slimkit import prune_checkpoint

    folder("llama", tmp_path / "base", "60KB")

    def work(place):
        prune_checkpoint(tmp_path / "base", place, 0.7, importance="l1", alignment=8)

    work(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    turn = 1
    while killed_at(turn, partial(work, tmp_path / f"k{turn}")):
        work(tmp_path / f"k{turn}")
        assert digests(tmp_path / f"k{turn}") == wanted
        turn += 13
    assert turn > 20


def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(tmp_path):
    from slimkit import prune_checkpoint

    folder("llama", tmp_path / "base", "10GB")
    base, out = tmp_path / "base", tmp_path / "out"
    with pytest.raises(ArgumentError, match="reserved_ratio"):
        prune_checkpoint(base, out, 1.5)
    with pytest.raises(ArgumentError, match="another directory"):
        prune_checkpoint(base, base, 0.7)
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        prune_checkpoint(base, out, 0.7, form="any")
    with pytest.raises(ArgumentError, match="calibration"):
        prune_checkpoint(base, out, 0.7, importance="taylor")
    with pytest.raises(ArgumentError, match="un_prune_list"):
        prune_checkpoint(base, out, 0.7, ["no such layer"], importance="l1")
    with pytest.raises(FileFormatError, match=r"config\.json"):
        prune_checkpoint(tmp_path, out, 0.7)
    assert not out.exists()
    prune_checkpoint(base, out, 0.7, importance="l1", alignment=8)
    with pytest.raises(UnsupportedError, match="settings"):
        prune_checkpoint(base, out, 0.6, importance="l1", alignment=8)
    with pytest.raises(ConfigError, match="pruned model already"):
        prune_checkpoint(out, tmp_path / "again", 0.7)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="shorter"):
        prune_checkpoint(base, tmp_path / "cut", 0.7, importance="l1")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    from slimkit import prune_checkpoint

    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ArgumentError, match="finite"):
        prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, importance="l1")
    assert not (tmp_path / "out").exists()


def test_the_command_streams_to_what_it_writes_otherwise(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from slimkit.cli import app
    from slimkit.core.jobs import streamed

    folder("llama", tmp_path / "base", "60KB")
    words = ["prune", "-m", str(tmp_path / "base"), "--keep-ratio", "0.7", "--importance", "l1", "--alignment", "8"]
    assert "Would keep" in CliRunner().invoke(app, [*words, "-o", "x", "--stream", "--dry-run"]).output
    for place, more in (("whole", []), ("small", ["--stream"])):
        if more:  # begun by a version that had fewer options
            assert killed_at(12, lambda: CliRunner().invoke(app, [*words, "-o", str(tmp_path / place), *more]))
            state = tmp_path / place / SHARDS / "job.json"
            job = json.loads(state.read_text())
            del job["settings"]["rotation"], job["settings"]["latency_table"]
            state.write_text(json.dumps(job))
        done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / place), *more])
        assert done.exit_code == 0, done.exception
    assert not (tmp_path / "small" / SHARDS).exists()
    plans = [json.loads((tmp_path / place / "plan.json").read_text()) for place in ("whole", "small")]
    assert plans[0] == plans[1]
    monkeypatch.setattr(streamed, "free_bytes", lambda: 1000)
    text = Path(__file__).with_name("test_prune_checkpoint.py")
    words = [w if w != "l1" else "auto" for w in words]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "small"), "--force", "--calib", f"{text}:texts"])
    assert done.exit_code in (0, 1), done.exception  # 1: widths lie too far apart to keep the share
    assert json.loads((tmp_path / "small" / "prune_report.json").read_text())["report"]["compensation"]["refitted"]
    assert "--stream" in (tmp_path / "small" / "README.md").read_text()


def texts(number=3):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number):
        ids = torch.randint(0, 64, (4, 16), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found[0]["attention_mask"][0, 10:] = 0
    return found


DATA = {
    "llama": {"importance": "auto"},
    "llama-bf16-tied": {"importance": "activation"},
    "gpt2": {"importance": "l1", "compensation": texts()},
    "bert": {"importance": "auto", "compensation": None},
}


@pytest.mark.parametrize("family", DATA)
def test_data_chooses_and_repairs_as_in_the_whole_model(family, tmp_path):
    from slimkit import PruneTorch, prune_checkpoint

    options = {"calibration": texts(), **DATA[family]}
    kind = folder(family, tmp_path / "base")
    report = prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, alignment=8, **options)
    wanted = kind.from_pretrained(tmp_path / "base", dtype="auto")
    pruner = PruneTorch(wanted).set_alignment(8)
    pruner.set_importance_evaluation_function(options["importance"], calibration=texts())
    if "compensation" in options:
        pruner.set_compensation(options["compensation"])
    desc = pruner.prune(0.7)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == json.loads(json.dumps(desc))
    assert report["report"].get("compensation") == pruner.report().get("compensation")
    got = kind.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, value in wanted.state_dict().items():
        assert torch.equal(got[name], value), name


def test_a_killed_calibrated_pruning_goes_on_to_the_same_bytes(tmp_path):
    from slimkit import prune_checkpoint

    folder("llama", tmp_path / "base", "60KB")

    def work(place):
        prune_checkpoint(tmp_path / "base", place, 0.7, calibration=texts(1), alignment=8)

    work(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    repaired = 0
    for turn in (2, 11, 16, 29):  # before the plan, while it is repaired, while shards are written
        part = tmp_path / f"k{turn}"
        assert killed_at(turn, partial(work, part))
        done = len(list((part / SHARDS / "repaired").glob("*.json")))
        repaired += 0 < done < 4
        work(part)
        assert digests(part) == wanted
    assert repaired


EXPERTS = {  # Mixtral's and Qwen's lie in the files one by one, the others in one tensor a layer
    "Mixtral": {"num_local_experts": 8},
    "Qwen3Moe": {"num_experts": 12, "moe_intermediate_size": 48, "head_dim": 8},
    "GptOss": {"num_local_experts": 8, "layer_types": ["full_attention"] * 2, "head_dim": 8},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_go_to_the_bits_of_the_whole_model(family, tmp_path):
    from slimkit import PruneTorch, prune_checkpoint

    import transformers as hf

    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**KV, num_experts_per_tok=2, **EXPERTS[family])
    kind = getattr(hf, f"{family}ForCausalLM")
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    left = ["*.self_attn.*"]
    report = prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, left, calibration=texts())
    wanted = kind.from_pretrained(tmp_path / "base", dtype="auto")
    pruner = PruneTorch(wanted).set_importance_evaluation_function("auto", calibration=texts())
    desc = pruner.prune(0.7, left)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == json.loads(json.dumps(desc))
    assert {v["kind"] for v in report["report"]["variables"].values() if v["keep"] < v["size"]} == {"experts"}
    got, told = kind.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for name, value in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


def test_gradients_of_all_weights_are_refused(tmp_path):
    from slimkit import prune_checkpoint

    folder("llama", tmp_path / "base")
    with pytest.raises(UnsupportedError, match="gradient of every weight"):
        prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, importance="taylor", calibration=texts())
    assert not (tmp_path / "out").exists()


def test_one_block_has_values_at_a_time(tmp_path, monkeypatch):
    from slimkit import lent, prune_checkpoint

    folder("llama", tmp_path / "base")
    plain = lent.LentModel.lend
    most = 0

    def lend(self, path):
        nonlocal most
        plain(self, path)
        real = {b for b in self.blocks for p in self._modules[b].parameters() if not p.is_meta}
        most = max(most, len(real))

    monkeypatch.setattr(lent.LentModel, "lend", lend)
    prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.7, calibration=texts(1), alignment=8)
    assert most == 1


def test_a_folder_is_pruned_in_a_fraction_of_its_size(tmp_path, monkeypatch):
    from slimkit import prune_checkpoint
    from slimkit.core.compare.memory import Peak
    from tools.bench import folders
    from tools.bench.peak import memory_mb

    monkeypatch.setitem(folders.SHAPES, "test", (512, 2048, 8, 8, 8, 32000))  # 133 MB, the largest tensor 33
    size = folders.write_model("test", tmp_path / "base", 50_000_000)
    assert size > 130e6
    prune_checkpoint(tmp_path / "base", tmp_path / "first", 0.8, importance="l1")  # libraries are loaded by now
    before = memory_mb("VmRSS") * 2**20
    with Peak() as peak:
        prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.8, importance="l1")
    assert peak.n_bytes is None or peak.n_bytes - before < 100e6  # generous: buffers of 16 MB, and what libraries keep
