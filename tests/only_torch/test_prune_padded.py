"""Cuts of any shape among zeros: transformers loads them, and they are the unpadded model exactly."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from slimkit import PruneTorch, check_pruning, load_pruned, merge_desc, save_pruned
from slimkit.core.errors import PlanError, UnsupportedError
from slimkit.core.prune.plan import PrunePlan
from tests.only_torch.test_prune_forms import ALONE, FAMILIES, answers, built
from tests.zoo import oracle

import torch
from torch import nn


def padded(name, ratio=0.7, **settings):
    model, inputs = built(name)
    with torch.no_grad():
        for k, (path, parameter) in enumerate(model.named_parameters()):
            if "norm" not in path.lower():
                # Scores spread differently in each block, so that one threshold leaves other widths.
                parameter.mul_(torch.rand(len(parameter), *[1] * (parameter.dim() - 1)) ** (k % 4))
    dense = copy.deepcopy(model)
    job = PruneTorch(model, inputs).set_alignment(4).set_node_reserved_ratio(0.2).set_form("padded")
    job.set_allocation("global")
    for setting, value in settings.items():
        getattr(job, setting)(value)
    return dense, model, inputs, job.prune(ratio), job.report()


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "qwen3moe", "mixtral", "gpt2", "whisper"])
def test_a_padded_model_is_the_unpadded_one_and_loads_without_slimkit(name, tmp_path):
    import transformers

    dense, model, inputs, desc, report = padded(name)
    padding = report["padding"]
    assert desc["padded"]
    assert padding["widths"]
    assert padding["params"] == report["left_params"] == sum(p.numel() for p in model.parameters())
    assert padding["zeros"] == padding["params"] - padding["live_params"] > 0
    assert abs(report["reached"] - 0.7) <= 0.02
    assert report["from_config"]["loads"]
    # Zeros of what a plan drops are what a smaller model does not have.
    assert check_pruning(dense, inputs, desc).holds
    model.save_pretrained(tmp_path)
    again = getattr(transformers, FAMILIES[name][0]).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        mine = oracle.call(model, inputs)
        assert torch.allclose(oracle.call(again, inputs), mine, atol=1e-5, rtol=0)
        said = answers(model, inputs)
        assert said is None or torch.equal(answers(again, inputs), said)
    if name == "llama":
        torch.save(inputs, tmp_path / "inputs.pt")
        subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path, FAMILIES[name][0]], check=True, cwd=tmp_path)
        assert torch.allclose(torch.load(tmp_path / "alone.pt"), mine, atol=1e-5, rtol=0)


def test_plan_of_a_padded_cut_travels(tmp_path):
    dense, model, inputs, desc, _ = padded("llama")
    save_pruned(tmp_path / "small", model, desc)
    again = load_pruned(tmp_path / "small", copy.deepcopy(dense))
    twin = copy.deepcopy(dense)
    PruneTorch(twin).prune_by_desc(desc)
    with torch.no_grad():
        mine = oracle.call(model, inputs)
        assert torch.equal(oracle.call(again, inputs), mine)
        assert torch.equal(oracle.call(twin, inputs), mine)
    # A second cut takes the zeros first, and both join into one plan.
    second = PruneTorch(twin, inputs).set_alignment(4).set_form("padded").set_allocation("global").prune(0.9)
    third = copy.deepcopy(dense)
    PruneTorch(third).prune_by_desc(merge_desc(desc, second))
    assert {n: t.shape for n, t in third.state_dict().items()} == {n: t.shape for n, t in twin.state_dict().items()}
    with torch.no_grad():
        assert torch.allclose(oracle.call(third, inputs), oracle.call(twin, inputs), atol=1e-5, rtol=0)
    with pytest.raises(PlanError, match="pads indices"):
        PrunePlan({**desc, "padded": {n: v["keep"] for n, v in desc["variables"].items()}})


def test_zeros_stay_through_repair_and_training(monkeypatch):
    batches = [{"input_ids": torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(k))} for k in (1, 2)]
    model, inputs = built("llama")
    dense = copy.deepcopy(model)
    job = PruneTorch(model, inputs).set_alignment(2).set_form("padded")
    desc = job.set_importance_evaluation_function("auto", calibration=batches).prune(0.7)
    zeros = PrunePlan(desc).zeros()
    assert zeros
    assert job.report()["compensation"]["refitted"]
    bare = copy.deepcopy(dense)
    PruneTorch(bare).prune_by_desc({**desc, "made": {}})
    with torch.no_grad():
        wanted, repaired, cut = (m(**batches[0]).logits for m in (dense, model, bare))
    assert (repaired - wanted).norm() < (cut - wanted).norm()

    def all_zero():
        found = dict(model.named_parameters())
        return all(
            not found[path].detach().index_select(axis, torch.from_numpy(index)).any()
            for path, axes in zeros.items()
            for axis, index in enumerate(axes)
            if index is not None
        )

    assert all_zero()
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in batches:
        adam.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        adam.step()
    assert all_zero()


def test_what_norms_go_over_stays_uniform_and_is_said():
    _, model, _, desc, report = padded("bert")
    assert model.config.hidden_size == 64
    assert report["padding"]["not_padded"]
    kinds = {n: v["kind"] for n, v in report["variables"].items()}
    assert not [n for n in desc["padded"] if kinds[n] == "hidden"]
    plain = PruneTorch(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.ones(1, 8))
    with pytest.raises(UnsupportedError, match="no configuration of Hugging Face"):
        plain.set_form("padded").prune(0.6)


def test_weight_normalisation_stays_finite_among_zeros():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)))
    _, desc = PruneTorch(net, torch.ones(1, 8)).set_alignment(1).analysis(0.6, [])
    gone = {n: sorted(set(range(v["size"])) - set(v["keep"])) for n, v in desc["variables"].items()}
    whole = {n: {"size": v["size"], "keep": list(range(v["size"]))} for n, v in desc["variables"].items()}
    wide, narrow, x = copy.deepcopy(net), copy.deepcopy(net), torch.randn(5, 8)
    PruneTorch(narrow).prune_by_desc(desc)
    PruneTorch(wide).prune_by_desc({**desc, "variables": whole, "padded": gone, "attributes": {}})
    assert wide[0].out_features == 16
    assert torch.allclose(wide(x), narrow(x), atol=1e-6)
