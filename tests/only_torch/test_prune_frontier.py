"""One pass of calibration, many budgets: plans that can be executed, and nested ones."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest

from slimkit import PruneTorch
from slimkit.core.errors import ArgumentError
from slimkit.core.prune.plan import PrunePlan

import torch

transformers = pytest.importorskip("transformers")

RATIOS = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def family(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    elif kind == "bert":
        config = transformers.BertConfig(**SIZES, max_position_embeddings=32)
    else:
        made = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind]
        config = made(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


@pytest.fixture(scope="module")
def batches():
    chance = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 60, (8, 16), generator=chance)} for _ in range(2)]


def pruner(model, batches, form=None):
    made = PruneTorch(model, {"input_ids": batches[0]["input_ids"][:1]}).set_alignment(4)
    if form:
        made.set_form(form)
    return made.set_importance_evaluation_function("auto", calibration=batches)


def dropped(desc):
    """(parameter, axis, index) of everything that a plan drops."""
    plan = PrunePlan(desc)
    return {
        (path, axis, index)
        for path, axes in plan.indices.items()
        for axis, kept in enumerate(axes)
        if kept is not None
        for index in set(range(plan.shapes[path][axis])) - set(kept.tolist())
    }


@pytest.mark.parametrize("form", ["config", "any"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert"])
def test_what_a_nested_plan_drops_all_harder_ones_drop(kind, form, batches):
    model = family(kind)
    found = pruner(model, batches, form).frontier(RATIOS, [], nested=True)
    points = found["points"]
    assert [p["asked"] for p in points] == RATIOS
    gone = [dropped(p["plan"]) for p in points]
    assert all(mild <= hard for mild, hard in pairwise(gone))
    assert len({len(g) for g in gone}) > 3  # or nothing was shown
    sizes = [p["left_params"] for p in points]
    assert sizes == sorted(sizes, reverse=True)
    for point in points[1:4]:
        assert point["reached"] == pytest.approx(point["asked"], abs=0.06)  # small widths take coarse steps


def test_budgets_cost_one_pass_and_are_those_of_single_calls(batches, monkeypatch):
    model = family("llama")
    made, passes = pruner(model, batches, "any"), [0]
    signals = made._wing.signals

    def counted(*args):
        passes[0] += 1
        return signals(*args)

    monkeypatch.setattr(made._wing, "signals", counted)
    found = made.frontier(RATIOS, [])
    assert passes == [1]
    assert made.analysis(0.7, [])[1] == found["points"][3]["plan"]
    assert passes == [1]
    for point in found["points"]:
        assert point["plan"] == pruner(model, batches, "any").analysis(point["asked"], [])[1]
    losses = [p["foretold_loss"] for p in found["points"]]
    assert losses == sorted(losses)
    assert losses[0] > 0
    kept, before = found["points"][3]["widths"]["model.layers.0.mlp.up_proj"]
    assert (len(found["points"][3]["plan"]["variables"]) > 0, before) == (True, 64)
    assert kept <= 64


def test_a_plan_of_the_frontier_is_executed_with_repair_as_prune_does(batches):
    model = family("llama")
    plan = json.loads(json.dumps(pruner(model, batches).frontier([0.9, 0.7], [])["points"][1]["plan"]))
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    whole = pruner(one, batches)
    desc = whole.prune(0.7, [])
    replayed = pruner(other, batches)
    assert replayed.prune_by_desc(plan, repair=True) is other
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    assert replayed.report()["compensation"] == whole.report()["compensation"]
    assert replayed.whole_desc()["made"]["repaired"] is desc["made"]["repaired"] is True
    assert "repaired" not in plan["made"]


def test_what_is_asked_wrongly_is_said_and_nothing_happens(batches):
    model = family("llama")
    made = pruner(model, batches)
    for wrong in ([], [0.5, 1.5]):
        with pytest.raises(ArgumentError, match="reserved_ratios"):
            made.frontier(wrong)
    with pytest.raises(TypeError, match="reserved_ratios"):
        made.frontier(0.5)
    plan = made.frontier([0.8])["points"][0]["plan"]
    plain = PruneTorch(model, {"input_ids": batches[0]["input_ids"][:1]})
    with pytest.raises(ArgumentError, match="set_compensation"):
        plain.prune_by_desc(plan, repair=True)
    assert model.model.layers[0].mlp.up_proj.out_features == 64
