"""What walks over folders say of the bytes that they read and write, and that they read their source once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from slimkit.core.sparse import SparseConfig
from tests.only_torch.test_sparse_checkpoint import build

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

HEADERS = 4096  # bytes of a file's header at most, here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("read") / "src"
    build("llama").save_pretrained(found, max_shard_size="30KB")
    return found


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (2, 12), generator=generator) for _ in range(4)]


def sizes(folder):
    """The bytes of all tensors, of those outside the blocks, and of those in them that no method changes."""
    from slimkit.core.checkpoint import shards

    places = shards.locate(folder)
    room = {name: place.stop - place.start for name, place in places.items()}
    outside = sum(n for name, n in room.items() if ".layers." not in name)
    norms = sum(n for name, n in room.items() if ".layers." in name and len(places[name].shape) == 1)
    return sum(room.values()), outside, norms


@pytest.mark.parametrize(
    ("kw", "walks"),
    [
        ({"method": "magnitude"}, 1),
        ({"method": "hessian"}, 1),
        ({"method": "par"}, 1),
        ({"method": "par", "residual": True}, 1),
        ({"method": "block", "options": {"passes": 1}}, 1),
        ({"method": "hessian", "uniform": "dlp"}, 3),  # one more gives the ratios, and one judges them
        ({"method": "par", "uniform": "measured"}, 3),
    ],
)
def test_blocks_are_read_once_and_what_is_outside_them_twice(kw, walks, folder, data, tmp_path, caplog):
    from slimkit.sparse import sparsify_checkpoint

    caplog.set_level(logging.INFO, logger="slimkit")
    moved = sparsify_checkpoint(folder, tmp_path / "out", SparseConfig(**kw), data)["bytes"]
    whole, outside, norms = sizes(folder)
    heads = HEADERS * len(list(folder.glob("*.safetensors")))
    # What stays as it is, is read to compute, and to be copied. A walk that judges reads the head, too.
    assert whole <= moved["read_source"] <= walks * whole + outside + norms + heads
    assert moved["source"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert moved["written"] > moved["source"]  # the result, and what waits to be put into it
    assert f"read {moved['read_source'] / 1e6:,.1f} MB of weights" in caplog.text
    again = sparsify_checkpoint(folder, tmp_path / "out", SparseConfig(**kw), data)["bytes"]
    assert again == {"source": moved["source"], "read_source": 0, "read_own": 0, "written": 0}


def test_what_is_cut_or_merged_is_read_once_and_what_is_scored_twice(folder, tmp_path):
    import slimkit
    from slimkit.core.weights.blocks import PruneConfig

    import transformers

    whole, _, _ = sizes(folder)
    heads = HEADERS * len(list(folder.glob("*.safetensors")))
    pruned = slimkit.prune_checkpoint(folder, tmp_path / "pruned", 0.7, importance="l1", alignment=8)["bytes"]
    assert whole < pruned["read_source"] <= 2.05 * whole  # scored, and cut
    steps = PruneConfig().set_steps(["prune_blocks"]).add_blocks_params(r"layers.(\d+).", {0: 0, 1: 2})
    cut = slimkit.cut_checkpoint(folder, tmp_path / "cut", {"num_hidden_layers": 2}, steps)["bytes"]
    assert 0.5 * whole < cut["read_source"] < whole
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    slimkit.apply_delta(model, "lora", ["*q_proj"], rank=2)
    slimkit.save_delta(model, tmp_path / "lora")
    merged = slimkit.merge_checkpoint(folder, tmp_path / "lora", tmp_path / "merged")["bytes"]
    assert whole <= merged["read_source"] <= whole + heads
    assert merged["written"] == pytest.approx(merged["source"], abs=heads)


def test_a_teachers_blocks_are_read_once_for_some_batches(folder, data, tmp_path, monkeypatch):
    from slimkit import TeacherCache
    from slimkit.core.distill.config import KnowledgeDistillConfig
    from slimkit.distill import cache

    losses = [{"func_name": "KDKLDiv", "func_weight": 1}]
    label = {"t_output_idx": 0, "s_output_idx": 0, "loss_func": losses}
    config = KnowledgeDistillConfig().add_output_soft_label(label)
    monkeypatch.setattr(cache, "WALKED_TOGETHER", 2)
    made = TeacherCache.build(folder, data, config, tmp_path / "cache")
    whole, outside, _ = sizes(folder)
    assert made.bytes["read_source"] == outside + 2 * (whole - outside)
    assert made.bytes["written"] > 0
    assert TeacherCache(tmp_path / "cache").bytes == {}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count")
def test_the_system_counts_no_more_reads_than_are_told(data, tmp_path):
    from slimkit.sparse import sparsify_checkpoint

    import transformers

    def of_the_system():
        lines = Path("/proc/self/io").read_text().splitlines()
        return {key: int(value) for key, value in (line.split(": ") for line in lines)}

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=4, **sizes))
    model.save_pretrained(tmp_path / "src", max_shard_size="1MB")
    config = SparseConfig(method="par")
    sparsify_checkpoint(tmp_path / "src", tmp_path / "first", config, data)  # imports what is needed
    before = of_the_system()
    moved = sparsify_checkpoint(tmp_path / "src", tmp_path / "out", config, data)["bytes"]
    after = of_the_system()
    read, written = (after[key] - before[key] for key in ("rchar", "wchar"))
    told = moved["read_source"] + moved["read_own"]
    assert told <= read <= 1.05 * told + (1 << 20)  # configuration, headers, samples
    assert moved["written"] <= written <= 1.05 * moved["written"] + (1 << 20)
