"""Checkpoints block by block: equal to the whole model, resumed to the same bytes, refused when inputs change."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys

import pytest

from slimkit.core.errors import ArgumentError, ConfigError, FileFormatError, UnsupportedError
from slimkit.core.sparse import SparseConfig

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def build(family):
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **SMALL))
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, **SMALL))
    if family == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(num_key_value_heads=2, head_dim=8, **SMALL))
    if family == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(num_key_value_heads=2, **SMALL))
    if family == "mixtral":  # its files hold every expert by itself, under older names
        return hf.MixtralForCausalLM(
            hf.MixtralConfig(num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, **SMALL)
        )
    if family == "gpt_oss":  # (in, out), with biases
        return hf.GptOssForCausalLM(
            hf.GptOssConfig(num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **SMALL)
        )
    if family == "bert":
        return hf.BertModel(hf.BertConfig(**SMALL))
    if family == "opt":
        return hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                word_embed_proj_dim=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=64,
                max_position_embeddings=64,
            )
        )
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(made[family], max_shard_size="30KB")
        return made[family]

    return make


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (4, 16), generator=generator) for _ in range(3)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def tree(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "opt", "bert", "mixtral", "gpt_oss"])
def test_block_by_block_equals_the_whole_model(family, source, data, tmp_path):
    from slimkit.sparse import Compressor, sparsify_checkpoint

    config = SparseConfig(method="hessian" if family == "gpt2" else "par")
    report = sparsify_checkpoint(source(family), tmp_path / "out", config, data)
    kind = type(build(family))
    ours = kind.from_pretrained(tmp_path / "out").eval()
    whole = kind.from_pretrained(source(family)).eval()
    left = [n for n, why in report["skipped"].items() if "tied" not in why]
    Compressor(whole, SparseConfig(method=config.method, ignore=left)).compress(data)
    for (name, a), b in zip(ours.state_dict().items(), whole.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)  # the same text on the same numbers
    assert report["ratio"] == 0.5


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    build("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.mark.parametrize("method", ["hessian", "par", "block"])
def test_a_bfloat16_folder_is_computed_in_float32_and_stays_bfloat16(method, halves, data, tmp_path, monkeypatch):
    """Later layers see rounded weights: the walk is that of a float32 model whose layers are rounded one by one."""
    from slimkit.sparse import Compressor, checkpoint
    from slimkit.sparse.framework import TorchSparse

    seen = set()
    step = torch.nn.functional.linear

    def linear(x, *rest):
        seen.add(x.dtype)
        return step(x, *rest)

    config = SparseConfig(method=method)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        report = checkpoint.sparsify_checkpoint(halves, tmp_path / "out", config, data)
    assert seen == {torch.float32}
    kind = type(build("llama"))
    ours = kind.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    if method == "block":
        return
    store = TorchSparse.store

    def rounded(self, name, weight, shift):
        store(self, name, weight.to(torch.bfloat16), shift)

    whole = kind.from_pretrained(halves, dtype=torch.float32).eval()
    left = [n for n, why in report["skipped"].items() if "tied" not in why]
    with monkeypatch.context() as patch:
        patch.setattr(TorchSparse, "store", rounded)
        Compressor(whole, SparseConfig(method=method, ignore=left)).compress(data)
    for (name, a), b in zip(ours.state_dict().items(), whole.state_dict().values()):
        assert torch.equal(a == 0, b == 0), name
        torch.testing.assert_close(a.float(), b, atol=0, rtol=2**-7, msg=name)  # a bit where the sum fell on an edge


def test_a_run_begun_before_an_option_came_goes_on(source, data, tmp_path, monkeypatch):
    from slimkit.sparse import checkpoint

    config = SparseConfig(method="hessian")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "copy_others", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)
    (job,) = (tmp_path / "out").rglob("job.json")
    kept = json.loads(job.read_text())
    del kept["config"]["weight_bits"], kept["config"]["outliers"], kept["compute"]
    job.write_text(json.dumps(kept))
    with pytest.raises(UnsupportedError, match="another config"):
        changed = SparseConfig(method="hessian", weight_bits=8)
        checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", changed, data)
    assert checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)["ratio"] == 0.5


def test_what_is_computed_in_is_part_of_the_job(halves, data, tmp_path, caplog):
    from slimkit.sparse import sparsify_checkpoint

    caplog.set_level("INFO", logger="slimkit")
    config = SparseConfig(method="hessian")
    sparsify_checkpoint(halves, tmp_path / "auto", config, data)
    assert "computed in float32, the files stay BF16" in caplog.text
    sparsify_checkpoint(halves, tmp_path / "named", config, data, compute_dtype="float32")
    assert tree(tmp_path / "auto") == tree(tmp_path / "named")
    sparsify_checkpoint(halves, tmp_path / "stored", config, data, compute_dtype=None)
    assert tree(tmp_path / "auto") != tree(tmp_path / "stored")
    with pytest.raises(ArgumentError, match="compute_dtype"):
        sparsify_checkpoint(halves, tmp_path / "other", config, data, compute_dtype="int8")


def test_trained_blocks_resume_to_the_same_bytes_and_equal_the_whole_model(source, data, tmp_path, monkeypatch):
    from slimkit.core.sparse import reconstruct
    from slimkit.sparse import Compressor, checkpoint

    monkeypatch.setattr(reconstruct, "LEAST", 10**6)  # the rows that train judge, too: there is something to gain
    monkeypatch.setattr(reconstruct, "HOLD_OUT", 10**6)
    config = SparseConfig(method="block", options={"passes": 3, "rate": 0.001})
    report = checkpoint.sparsify_checkpoint(source("qwen2"), tmp_path / "whole", config, data)
    write = checkpoint.CheckpointSparse._write

    def stop(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointSparse, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.sparsify_checkpoint(source("qwen2"), tmp_path / "out", config, data)
    assert checkpoint.sparsify_checkpoint(source("qwen2"), tmp_path / "out", config, data)["ratio"] == 0.5
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    dense, ours = (type(build("qwen2")).from_pretrained(p).eval() for p in (source("qwen2"), tmp_path / "out"))
    trained = {n.rpartition(".")[2] + str(p.ndim) for n, p in ours.named_parameters() if "layers." in n}
    assert trained == {"weight2", "weight1", "bias1"}
    moved = {n for (n, a), b in zip(ours.named_parameters(), dense.parameters()) if not torch.equal(a, b)}
    assert any("layernorm" in n for n in moved)
    left = [n for n, why in report["skipped"].items() if "tied" not in why]
    Compressor(dense, SparseConfig(method="block", options={"passes": 3, "rate": 0.001}, ignore=left)).compress(data)
    for (name, a), b in zip(ours.state_dict().items(), dense.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)  # the same text on the same numbers


@pytest.mark.parametrize(("method", "rule"), [("hessian", "measured"), ("magnitude", "measured"), ("hessian", "dlp")])
def test_ratios_of_a_rule_are_those_of_the_whole_model(method, rule, source, data, tmp_path, monkeypatch):
    from slimkit.core.sparse import allocate
    from slimkit.sparse import Compressor, sparsify_checkpoint

    monkeypatch.setattr(allocate, "SHARE", 1)
    config = SparseConfig(method=method, uniform=rule)
    report = sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)
    left = [n for n, why in report["skipped"].items() if "tied" not in why]
    whole = type(build("llama")).from_pretrained(source("llama")).eval()
    expected = Compressor(whole, SparseConfig(method=method, uniform=rule, ignore=left)).compress(data)
    found, wanted = report["allocation"], expected["allocation"]
    assert (found["kept"], found["probe_batches"], found["held_out"]) == (
        wanted["kept"],
        wanted["probe_batches"],
        False,
    )
    assert found["uniform_error"] == pytest.approx(wanted["uniform_error"], rel=1e-4)
    assert found[f"{rule}_error"] == pytest.approx(wanted[f"{rule}_error"], rel=1e-3)
    if found["kept"] == rule:
        ratios = {name: row["ratio"] for name, row in report["layers"].items()}
        assert len(set(ratios.values())) > 1
        assert ratios == pytest.approx({name: row["ratio"] for name, row in expected["layers"].items()}, abs=0.01)


def test_no_data_is_needed_for_magnitude(source, tmp_path):
    from slimkit.sparse import sparsify_checkpoint

    (tmp_path / "out" / ".slimkit-sparse").mkdir(parents=True)  # what a kill in the first moment leaves
    steps = []
    report = sparsify_checkpoint(source("llama"), tmp_path / "out", SparseConfig(), None, on_progress=steps.append)
    assert report["ratio"] == 0.5
    assert [s.layer for s in steps] == list(report["layers"])
    assert [s.done for s in steps] == list(range(1, len(steps) + 1))
    assert steps[0].seconds_left > steps[-1].seconds_left >= 0


class CallsLeft:
    """A profiler that counts a run's calls, and kills the process with SIGKILL after so many of them."""

    def __init__(self, limit=None):
        self.seen, self.limit = 0, limit

    def __call__(self, *_):
        self.seen += 1
        if self.seen == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_after(calls, work):
    """Run `work` in a child that dies after that many calls; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            sys.setprofile(CallsLeft(calls))
            work()
        finally:
            os._exit(0)  # never back into pytest
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_twenty_random_points_of_the_run_the_bytes_are_the_same(source, data, tmp_path):
    from slimkit.sparse import sparsify_checkpoint

    def work(target):
        return sparsify_checkpoint(source("llama"), target, SparseConfig(method="hessian"), data)

    work(tmp_path / "whole")  # imports the model's class
    counter = CallsLeft()
    sys.setprofile(counter)
    try:
        work(tmp_path / "again")
    finally:
        sys.setprofile(None)
    expected = tree(tmp_path / "whole")
    assert tree(tmp_path / "again") == expected
    # Points all over the run, its last steps included: each from a tenth of its own. Every target is killed twice,
    # the second time while it resumes.
    dice = random.Random(0)
    points = [counter.seen * (i + dice.random()) / 10 for i in range(10)]
    killed = 0
    for index, point in enumerate(points):
        target = tmp_path / f"killed{index}"
        killed += killed_after(int(point), lambda: work(target))
        killed += killed_after(int(dice.choice(points) / 2), lambda: work(target))
        assert work(target)["ratio"] == 0.5
        assert tree(target) == expected
        shutil.rmtree(target)
    assert killed >= 15  # what is left to resume may be done before it is time to die


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_second_run_in_the_same_folder_is_refused_and_spoils_nothing(source, data, tmp_path):
    from slimkit.core.locks import locked
    from slimkit.sparse import sparsify_checkpoint
    from slimkit.sparse.checkpoint import STATE

    target, config, seen = tmp_path / "out", SparseConfig(method="hessian"), []

    def second(_step):
        before = tree(target)
        with pytest.raises(ConfigError, match="another run is using"):
            sparsify_checkpoint(source("llama"), target, config, data)
        assert tree(target) == before
        seen.append(before)

    sparsify_checkpoint(source("llama"), target, config, data, on_progress=second)
    assert len(seen) == 21
    sparsify_checkpoint(source("llama"), tmp_path / "alone", config, data)
    assert tree(target) == tree(tmp_path / "alone")
    with locked(target / STATE, "dst", inside=True):  # it is free again
        pass


def test_a_run_tells_how_far_it_is_and_what_stopped_it(source, data, tmp_path):
    from slimkit.core.jobs.status import status
    from slimkit.sparse import sparsify_checkpoint

    target, config, seen = tmp_path / "out", SparseConfig(method="hessian"), []

    def look(step):
        seen.append(status(target))
        if step.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsify_checkpoint(source("llama"), target, config, data, on_progress=look)
    assert {found["state"] for found in seen} == {"running"}
    assert [found["done"]["layers"] for found in seen] == [[i, 21] for i in range(1, 11)]
    assert seen[-1]["done"]["blocks"] == [1, 3]
    assert seen[-1]["rows"] == 3 * 64
    stopped = status(target)
    assert (stopped["state"], stopped["why"], stopped["processes"]) == ("stopped", "KeyboardInterrupt", 1)
    sparsify_checkpoint(source("llama"), target, config, data)
    assert status(target)["state"] == "finished"
    sparsify_checkpoint(source("llama"), tmp_path / "alone", config, data)
    assert tree(target) == tree(tmp_path / "alone")


def test_a_changed_job_is_refused_by_name(source, data, tmp_path, monkeypatch):
    from slimkit.sparse import checkpoint

    def stop(self, index, *rest):
        raise KeyboardInterrupt

    config = SparseConfig(method="hessian")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointSparse, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)
    for change, word in (
        ((source("llama"), SparseConfig(method="hessian", sparse_ratio=0.6), data), "config"),
        ((source("llama"), config, data[:2]), "dataset"),
        ((source("qwen2"), config, data), "source"),
    ):
        with pytest.raises(UnsupportedError, match=word):
            checkpoint.sparsify_checkpoint(change[0], tmp_path / "out", *change[1:])
    # the same weights under another configuration are another model
    told = source("llama") / "config.json"
    kept = told.read_text()
    told.write_text(kept.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    assert told.read_text() != kept
    with pytest.raises(UnsupportedError, match="another model"):
        checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)
    told.write_text(kept)
    assert checkpoint.sparsify_checkpoint(source("llama"), tmp_path / "out", config, data)["ratio"] == 0.5


def test_what_cannot_be_done_is_refused(source, data, tmp_path):
    from slimkit.sparse import sparsify_checkpoint

    with pytest.raises(ArgumentError, match="dst"):
        sparsify_checkpoint(source("llama"), source("llama"), SparseConfig(), None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ArgumentError, match="dst"):
        sparsify_checkpoint(source("llama"), tmp_path / "full", SparseConfig(), None)
    with pytest.raises(ArgumentError, match="offload"):
        sparsify_checkpoint(source("llama"), tmp_path / "a", SparseConfig(), data, offload="tape")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="safetensors"):
        sparsify_checkpoint(tmp_path / "empty", tmp_path / "b", SparseConfig(), None)
    broken = tmp_path / "broken"
    shutil.copytree(source("llama"), broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match="shorter"):
        sparsify_checkpoint(broken, tmp_path / "c", SparseConfig(), None)


def test_names_of_another_layout_are_mapped(source, tmp_path):
    from safetensors.torch import load_file, save_file

    from slimkit.sparse import sparsify_checkpoint

    other = tmp_path / "other"
    build("llama").save_pretrained(other)
    file = next(other.glob("*.safetensors"))
    save_file({k.replace("mlp", "ffn"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UnsupportedError, match="mlp"):
        sparsify_checkpoint(other, tmp_path / "out", SparseConfig(), None)
    shutil.rmtree(tmp_path / "out")
    report = sparsify_checkpoint(
        other, tmp_path / "out", SparseConfig(), None, names=lambda name: name.replace("mlp", "ffn")
    )
    assert report["ratio"] == 0.5


def test_a_sharded_model_in_the_hugging_face_cache_is_read(tmp_path):
    from slimkit import sparsify_checkpoint
    from tests.both.test_hub_cache import cached

    build("llama").save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    config = SparseConfig(method="magnitude")
    made = {}
    for name, src in (("plain", tmp_path / "plain"), ("cached", cached(tmp_path / "plain", tmp_path / "hub"))):
        sparsify_checkpoint(src, tmp_path / f"out_{name}", config, [])
        made[name] = {f.name: f.read_bytes() for f in (tmp_path / f"out_{name}").glob("*.safetensors")}
    assert len(made["plain"]) > 1
    assert made["cached"] == made["plain"]


def test_the_result_appears_whole_or_not_at_all(source, tmp_path, monkeypatch):
    from slimkit import sparsify_checkpoint
    from slimkit.core import files

    src = source("llama")
    config, target = SparseConfig(method="magnitude"), tmp_path / "out"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "commit", full)
    with pytest.raises(OSError, match="space"):
        sparsify_checkpoint(src, target, config, [])
    assert {f.name for f in target.iterdir()} == {".slimkit-sparse"}
    monkeypatch.undo()
    sparsify_checkpoint(src, target, config, [])
    assert {f.name for f in src.glob("*.safetensors")} == {f.name for f in target.glob("*.safetensors")}
