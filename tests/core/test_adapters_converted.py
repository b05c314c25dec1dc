"""Adapters between PEFT, MindFormers and Megatron: the values, the way back, shards, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core import files
from slimkit.core.convert.adapters import convert_adapter, factors
from slimkit.core.convert.adapters.names import Slot, path_of, slot_of, whole_of, wholes
from slimkit.core.delta.tensors import further
from slimkit.core.errors import ArgumentError, FileFormatError, PlanError, UnsupportedError

torch = pytest.importorskip("torch")

HEADS, GROUPS, WIDTH, HIDDEN, INNER = 8, 4, 4, 32, 24
BASE = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "model_type": "llama"}
SIZES = {
    "q_proj": (HEADS * WIDTH, HIDDEN), "k_proj": (GROUPS * WIDTH, HIDDEN), "v_proj": (GROUPS * WIDTH, HIDDEN),
    "o_proj": (HIDDEN, HEADS * WIDTH), "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER), "w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER),
}  # fmt: skip
LLAMA = [f"model.layers.{i}.{m}" for i in (0, 1) for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)]  # fmt: skip
MIXTRAL = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}" for e in (0, 1) for w in ("w1", "w2", "w3")]
MIXTRAL += LLAMA[:4]
SOME = [p for p in LLAMA if p.endswith(("q_proj", "v_proj", "up_proj"))]


def adapter(folder, paths, *, rank=2, dtype=np.float32, shared=False, seed=0, **config):
    """A PEFT adapter on these matrices."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for path in paths:
        rows, columns = SIZES[path.rpartition(".")[2]]
        own = np.random.default_rng(7) if shared else rng
        tensors[f"base_model.model.{path}.lora_A.weight"] = own.standard_normal((rank, columns)).astype(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(dtype)
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
            "target_modules": sorted({p.rpartition(".")[2] for p in paths}), "lora_dropout": 0.1, **config}  # fmt: skip
    folder.mkdir(exist_ok=True)
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    files.write_json(folder / "adapter_config.json", told)
    return folder


def content(folder):
    from slimkit.core.delta import tensors

    held = tensors.read(folder / "adapter_model.safetensors", "file")
    return json.loads((folder / "adapter_config.json").read_text()), {
        n: (v.dtype.name, tensors.bits(v).tolist()) for n, v in held.items()
    }


@pytest.mark.parametrize("paths", [LLAMA, MIXTRAL, SOME], ids=["llama", "mixtral", "q-v-up"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_to_megatron_and_back_is_bit_for_bit(tmp_path, paths, shared, shards):
    source = adapter(tmp_path / "peft", paths, shared=shared, dtype=further("bfloat16") if shards == 2 else np.float32)
    report = convert_adapter(source, tmp_path / "mg", to="megatron", config=BASE, tensor_parallel=shards)
    assert report.tensor_parallel == shards
    assert len(list((tmp_path / "mg" / "iter_0000001").iterdir())) == shards
    convert_adapter(tmp_path / "mg", tmp_path / "back", to="peft")
    assert content(tmp_path / "back") == content(source)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("paths", [LLAMA, SOME], ids=["llama", "q-v-up"])
def test_to_mindformers_and_back_is_bit_for_bit(tmp_path, paths, fused):
    source = adapter(tmp_path / "peft", paths, dtype=np.float16)
    report = convert_adapter(source, tmp_path / "ms", to="mindformers", config=BASE, fused=fused)
    assert ("lora_rank=6, lora_alpha=12" in report.notes[0]) == (fused and paths is LLAMA)
    convert_adapter(tmp_path / "ms", tmp_path / "back", to="peft")
    assert content(tmp_path / "back") == content(source)


def test_shards_compute_what_the_adapter_computes(tmp_path, rng):
    source = adapter(tmp_path / "peft", LLAMA[:7])
    report = convert_adapter(source, tmp_path / "mg", to="megatron", config=BASE, tensor_parallel=2)
    scale = report.alpha / report.rank
    assert scale == 4 / 2
    shards = [
        {n: v.numpy() for n, v in torch.load(p, weights_only=True)["model"].items()}
        for p in sorted((tmp_path / "mg").glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    ]
    plain = {n: torch.from_numpy(v) for n, v in files.read_tensors(source / "adapter_model.safetensors")[0].items()}

    def wanted(last, x):
        a, b = (plain[f"base_model.model.model.layers.0.{last}.lora_{h}.weight"].numpy() for h in "AB")
        return x @ a.T @ b.T

    def got(name, shard, x):
        a, b = (shards[shard][f"decoder.layers.0.{name}.lora_{h}.default.weight"] for h in "AB")
        return x @ a.T @ b.T

    x = rng.standard_normal((3, HIDDEN)).astype(np.float32)
    rows = np.concatenate([got("self_attention.linear_qkv", i, x) for i in range(2)], 1)
    by_group = rows.reshape(3, GROUPS, HEADS // GROUPS + 2, WIDTH)  # Megatron's order: queries, key, value of a group
    queries = by_group[:, :, :-2].reshape(3, -1)
    np.testing.assert_allclose(queries, wanted("self_attn.q_proj", x), atol=1e-4)
    np.testing.assert_allclose(by_group[:, :, -2].reshape(3, -1), wanted("self_attn.k_proj", x), atol=1e-4)
    np.testing.assert_allclose(by_group[:, :, -1].reshape(3, -1), wanted("self_attn.v_proj", x), atol=1e-4)
    halves = [np.split(got("mlp.linear_fc1", i, x), 2, 1) for i in range(2)]  # each process: its gate, its up
    np.testing.assert_allclose(np.concatenate([h[1] for h in halves], 1), wanted("mlp.up_proj", x), atol=1e-4)
    inner = rng.standard_normal((3, INNER)).astype(np.float32)
    summed = sum(got("mlp.linear_fc2", i, part) for i, part in enumerate(np.split(inner, 2, 1)))
    np.testing.assert_allclose(summed, wanted("mlp.down_proj", inner), atol=1e-4)


def test_files_that_others_wrote_need_alpha_and_heads_and_come_back_the_same(tmp_path, rng):
    model = {}
    for name, rows, columns in (("self_attention.linear_qkv", 64, HIDDEN), ("mlp.linear_fc1", 48, HIDDEN)):
        for half, shape in (("A", (2, columns)), ("B", (rows, 2))):
            key = f"base_model.model.decoder.layers.0.{name}.lora_{half}.default.weight"
            model[key] = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    import argparse

    place = tmp_path / "mg" / "mp_rank_00"
    place.mkdir(parents=True)
    torch.save({"model": model, "args": argparse.Namespace(lora_r=2)}, place / "model_optim_rng.pt")
    with pytest.raises(ArgumentError, match="alpha must be given"):
        convert_adapter(tmp_path / "mg", tmp_path / "peft", to="peft")
    with pytest.raises(ArgumentError, match="num_attention_heads"):
        convert_adapter(tmp_path / "mg", tmp_path / "peft", to="peft", alpha=8)
    convert_adapter(tmp_path / "mg", tmp_path / "peft", to="peft", alpha=8, config=BASE)
    config, tensors = content(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    a = {n: v for n, v in tensors.items() if n.endswith("lora_A.weight") and "self_attn" in n}
    assert len(a) == 3
    assert len({json.dumps(v) for v in a.values()}) == 1
    report = convert_adapter(tmp_path / "peft", tmp_path / "again", to="megatron", config=BASE)
    assert report.rank == 2
    again = torch.load(tmp_path / "again/iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
    assert all(torch.equal(again[n.removeprefix("base_model.model.")], v) for n, v in model.items())


def test_what_was_trained_beyond_its_place_is_kept(tmp_path):
    source = adapter(tmp_path / "peft", LLAMA[:3])
    convert_adapter(source, tmp_path / "mg", to="megatron", config=BASE)
    path = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    held = torch.load(path, weights_only=True)
    held["model"]["decoder.layers.0.self_attention.linear_qkv.lora_B.default.weight"] += 1.0
    torch.save(held, path)
    report = convert_adapter(tmp_path / "mg", tmp_path / "back", to="peft")
    config, tensors = content(tmp_path / "back")
    assert "3 matrices were trained beyond" in report.notes[0]
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    assert len(tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"][1]) == 6


@pytest.mark.parametrize(
    ("made", "options", "error", "words"),
    [
        ({"use_dora": True}, {}, UnsupportedError, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, {}, UnsupportedError, "modules_to_save"),
        ({"alpha_pattern": {"k_proj": 16}}, {}, UnsupportedError, "one alpha"),
        ({}, {"config": None}, ArgumentError, "num_attention_heads"),
        ({}, {"tensor_parallel": 3}, PlanError, "4 key-value heads"),
        ({}, {"config": {"num_attention_heads": 5}}, PlanError, "do not divide"),
        ({}, {"to": "mindformers", "tensor_parallel": 2}, ArgumentError, "Megatron alone"),
        ({}, {"to": "paddle"}, ArgumentError, "must be one of"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_written(tmp_path, made, options, error, words):
    source = adapter(tmp_path / "peft", LLAMA, **made)
    with pytest.raises(error, match=words):
        convert_adapter(source, tmp_path / "out", **{"to": "megatron", "config": BASE, **options})
    assert not (tmp_path / "out").exists()


def test_names_and_damage_are_told(tmp_path):
    strange = adapter(tmp_path / "strange", LLAMA[:1])
    held = files.read_tensors(strange / "adapter_model.safetensors")[0]
    renamed = {n.replace("self_attn.q_proj", "attn.c_attn"): v for n, v in held.items()}
    files.write_tensors(strange / "adapter_model.safetensors", renamed)
    with pytest.raises(UnsupportedError, match=r"attn\.c_attn"):
        convert_adapter(strange, tmp_path / "out", to="megatron", config=BASE)
    files.write_tensors(strange / "adapter_model.safetensors", dict(list(held.items())[:1]))
    with pytest.raises(FileFormatError, match="lacks"):
        convert_adapter(strange, tmp_path / "out", to="megatron", config=BASE)
    source = adapter(tmp_path / "peft", LLAMA)
    convert_adapter(source, tmp_path / "mg", to="megatron", config=BASE, tensor_parallel=2)
    path = tmp_path / "mg/iter_0000001/mp_rank_01/model_optim_rng.pt"
    held = torch.load(path, weights_only=True)
    held["model"]["decoder.layers.0.mlp.linear_fc1.lora_A.default.weight"] += 1
    torch.save(held, path)
    with pytest.raises(FileFormatError, match="same in every shard"):
        convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    for name in held["model"]:
        held["model"][name] = held["model"][name][:1] if "lora_A" in name else held["model"][name][:, :1]
    for shard in tmp_path.glob("mg/iter_*/mp_rank_*/model_optim_rng.pt"):
        torch.save(held, shard)
    with pytest.raises(FileFormatError, match=r"rank 1, where slimkit_adapter\.json says 6"):
        convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    record = files.read_json(tmp_path / "mg/slimkit_adapter.json")
    for odd in ({"rank": 0}, {"groups": 0}, {"heads": 5}):
        files.write_json(tmp_path / "mg/slimkit_adapter.json", {**record, **odd})
        with pytest.raises(FileFormatError, match="multiple of groups"):
            convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    place = next(iter(record["modules"]))
    for odd in ([3, 4], [0, 0], [1, -1]):
        files.write_json(tmp_path / "mg/slimkit_adapter.json", {**record, "modules": {place: odd}})
        with pytest.raises(FileFormatError, match="a rank and a place"):
            convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    files.write_json(tmp_path / "mg/slimkit_adapter.json", record)
    path.unlink()
    with pytest.raises(FileFormatError, match="model_optim_rng"):
        convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    (tmp_path / "mg/slimkit_adapter.json").write_text('{"format": "slimkit-adapter", "version": 2}')
    with pytest.raises(FileFormatError, match="version 2"):
        convert_adapter(tmp_path / "mg", tmp_path / "out", to="peft")
    with pytest.raises(FileFormatError, match="holds no adapter"):
        convert_adapter(tmp_path, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_groups_and_shards_have_a_way_back(groups, queries, width, count):
    rows = {r: np.random.default_rng(0).random((n * width, 2)) for r, n in
            (("query", groups * queries * count), ("key", groups * count), ("value", groups * count))}  # fmt: skip
    cut = factors.shards(rows, tuple(rows), groups * count, count)
    back = factors.gathered(cut, tuple(rows), groups * count, queries)
    assert all(np.array_equal(back[r], rows[r]) for r in rows)


@given(st.integers(0, 99), st.sampled_from(["query", "key", "value", "out", "gate", "up", "down"]), st.booleans())
def test_names_have_a_way_back(layer, role, fused):
    slot = Slot(layer, role)
    assert slot_of(path_of(slot)) == slot
    for layout in ("megatron", "mindformers"):
        (whole,) = wholes([slot], layout, fused=fused)
        assert whole_of(whole.name, layout) == whole
        assert slot in whole.slots
