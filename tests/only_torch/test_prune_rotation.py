"""A hidden width that is turned onto its principal axes before it is cut."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest

from slimkit import PruneTorch, load_pruned, save_pruned
from slimkit.core import files
from slimkit.core.errors import ArgumentError, FileFormatError, PlanError, UnsupportedError
from slimkit.core.prune.latency import digest_of
from slimkit.core.prune.rotation import Rotation, principal_axes, turned_values
from tests.only_torch.test_prune_experts import built as experts

import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {"Llama": {"tie_word_embeddings": True}, "Qwen2": {}, "Mistral": {"tie_word_embeddings": False}, "Qwen3": {}}
IDS = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
INNER = ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj"]  # what stays, so that the hidden width must go


def built(family, **sizes):
    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES[family], **sizes}
    if family == "Qwen2":
        del sizes["head_dim"]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    mix = torch.randn(32, 32) @ torch.diag(torch.logspace(0, -2, 32)) / 4  # the stream lies near some of its axes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(mix @ parameter)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ mix.T * 4)
    return model


def pruner(model, on=True):
    job = PruneTorch(model, {"input_ids": IDS[:2]}).set_alignment(4).set_rotation(on).set_compensation(None)
    return job.set_importance_evaluation_function("auto", calibration=BATCHES)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_model_says_the_same(family):
    model = built(family)
    before = logits(model)
    job = pruner(model)
    job._solved()
    stream, wing = job._stream, job._wing
    rotation = principal_axes(stream, lambda layers: wing.signals(BATCHES, layers, None, 0), wing.read)
    turn_back = wing.turn(turned_values(stream, rotation, np.arange(32), wing.read), job._parted)
    assert not torch.allclose(
        model.model.layers[0].self_attn.q_proj.weight, built(family).model.layers[0].self_attn.q_proj.weight
    )
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)
    turn_back()
    assert torch.equal(logits(model), before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_what_is_cut_loads_without_slimkit_and_is_nearer_than_with_channels_picked(family, tmp_path):
    dense = built(family)
    wanted, away = logits(dense).log_softmax(-1), {}
    for on in (True, False):
        model = copy.deepcopy(dense)
        job = pruner(model, on)
        desc = job.prune(0.85, INNER)
        assert model.config.hidden_size < 32
        assert model.config.num_attention_heads == 4
        away[on] = float((wanted.exp() * (wanted - logits(model).log_softmax(-1))).sum(-1).mean())
        if on:
            turned, told = model, desc
            assert job.report()["from_config"]["loads"]
            assert model.config.tie_word_embeddings is False
            assert job.report()["reached"] == pytest.approx(
                sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
            )
    assert away[True] < away[False]
    turned.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(logits(again), logits(turned), atol=1e-5, rtol=1e-5)
    save_pruned(tmp_path / "own", turned, told)
    torch.testing.assert_close(logits(load_pruned(tmp_path / "own", built(family))), logits(turned))
    weights = tmp_path / "own" / "model.safetensors"
    tensors, about = files.read_tensors(weights)
    files.write_tensors(weights, {**tensors, "model.norm.weight": tensors["model.norm.weight"][1:]}, about)
    fresh = built(family)
    with pytest.raises(FileFormatError, match="does not fit"):
        load_pruned(tmp_path / "own", fresh)
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is dense.config.tie_word_embeddings
    assert torch.equal(logits(fresh), logits(dense))
    with pytest.raises(PlanError, match="a plan holds no axes"):
        PruneTorch(built(family), {"input_ids": IDS[:2]}).prune_by_desc(told)


def test_the_cut_is_repaired_and_an_error_leaves_the_model(monkeypatch):
    model = built("Llama")
    before, state = logits(model), copy.deepcopy(model.state_dict())
    job = pruner(model).set_compensation(BATCHES)
    monkeypatch.setattr(job._wing, "compensate", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.prune(0.85, INNER)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), before)
    job = pruner(model).set_compensation(BATCHES)
    job.prune(0.85, INNER)
    assert {"lm_head", "model.layers.0.mlp.gate_proj"} <= job.report()["compensation"]["refitted"].keys()


def test_streams_that_cannot_be_turned_are_refused_with_the_reason():
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    job = pruner(transformers.GPT2LMHeadModel(config).eval())
    with pytest.raises(UnsupportedError, match=r"cannot be turned: a LayerNorm in transformer\.h\.0"):
        job.analysis(0.9, [])
    with pytest.raises(UnsupportedError, match="experts and their routers are not turned"):
        pruner(experts("Mixtral"))._solved()  # before any calibration
    job = PruneTorch(
        torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)), torch.ones(1, 8)
    )
    with pytest.raises(UnsupportedError, match="one residual stream"):
        job.set_rotation().analysis(0.9)
    with pytest.raises(ArgumentError, match='needs the importance "output"'):
        PruneTorch(built("Llama"), {"input_ids": IDS[:2]}).set_rotation().set_importance_evaluation_function(
            "l1"
        ).analysis(0.9)


class Normed(torch.nn.Module):
    """A table, a norm of some kind, and what reads it."""

    def __init__(self, norm):
        super().__init__()
        self.table, self.head, self.norm = torch.nn.Embedding(60, 32), torch.nn.Linear(32, 4), norm

    def forward(self, ids):
        return self.head(self.norm(self.table(ids)))


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (lambda x: x * x.pow(4).mean(-1, keepdim=True).rsqrt(), "pow, which depends on its axes"),
        (lambda x: torch.ones(()) / x, "div, which depends on its axes"),
        (lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(), ""),
        (lambda x: x / (x * x).mean(-1, keepdim=True).sqrt(), ""),
        (lambda x: x / (x * x).sum(-1, keepdim=True).sqrt(), "a sum over its features in"),
    ],
)
def test_only_the_root_mean_square_is_the_same_on_all_axes(norm, why):
    job = PruneTorch(Normed(norm), IDS[:2]).set_rotation()
    if why:
        with pytest.raises(UnsupportedError, match=why):
            job._solved()
    else:
        job._solved()


NET = """
from tests.only_torch.test_prune_rotation import BATCHES, IDS, built

def net():
    return built("Llama")

def data():
    example = {"input_ids": IDS[:2]}
    return {"train": [(example, IDS[:2])], "example": example, "calibration": BATCHES}
"""


def test_a_recipe_turns_and_a_later_stage_begins_at_the_turned_model(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from slimkit.cli import app
    from slimkit.core.run import report

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "render", lambda _: "")
    (tmp_path / "turned_net.py").write_text(NET)
    stages = [
        {"prune": {"reserved_ratio": 0.85, "alignment": 4, "rotation": True, "un_prune_list": INNER}},
        {"sparsify": {"method": "magnitude", "sparse_ratio": 0.5}},
    ]
    recipe = {"version": 1, "name": "x", "model": "turned_net.py:net", "data": "turned_net.py:data", "stages": stages}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    found = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["run", "r.yaml", "-o", "run", "-q"])
        assert done.exit_code in (0, 1), done.exception  # 1: widths lie too far apart to keep the share
        weights = next((tmp_path / "run").rglob("*sparsify/model.safetensors"))
        found.append(weights.read_bytes())
        shutil.rmtree(weights.parent)  # as if the run had been stopped in that stage
        (tmp_path / "run" / "report.json").unlink()
    assert found[0] == found[1]


def test_a_table_of_times_knows_the_network_that_is_turned():
    tied = built("Llama")
    plain, turned = (digest_of(pruner(tied, on)._solved().view([])) for on in (False, True))
    assert plain == turned


def test_the_axes_are_orthogonal_and_ordered_by_loss():
    job = pruner(built("Qwen3"))
    job.analysis(0.85, INNER)
    rotation = job._scoring.rotation
    assert isinstance(rotation, Rotation)
    np.testing.assert_allclose(rotation.axes.T @ rotation.axes, np.eye(32), atol=1e-10)
    assert np.corrcoef(np.argsort(np.argsort(-rotation.losses)), np.arange(32))[0, 1] > 0.8
