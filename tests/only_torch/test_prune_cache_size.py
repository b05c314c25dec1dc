"""The budget "kv_cache": heads of keys and values go, and nothing else."""

from __future__ import annotations

import copy

import pytest

from slimkit import PruneTorch
from slimkit.core.errors import ArgumentError

import torch

transformers = pytest.importorskip("transformers")

IDS = torch.arange(32).reshape(2, 16) % 64


def llama(groups, implementation="sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, head_dim=8,
        num_key_value_heads=groups, attn_implementation=implementation, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def cached(model):
    """Numbers in the cache after one pass."""
    found = model(IDS, use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in found.layers)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [8, 4, 2])
@pytest.mark.parametrize("importance", ["l1", "auto"])
def test_half_the_cache_is_half_the_cache_that_the_model_holds(groups, implementation, importance):
    model = llama(groups, implementation)
    before = cached(model)
    pruner = PruneTorch(model, {"input_ids": IDS}).set_budget("kv_cache").set_alignment(1)
    data = [{"input_ids": IDS.flip(1)}] if importance == "auto" else None
    pruner.set_importance_evaluation_function(importance, calibration=data).prune(0.5, [])
    assert cached(model) / before == pruner.report()["reached"] == 0.5
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (groups // 2, 4)
    assert (model.config.intermediate_size, model.config.hidden_size, model.config.head_dim) == (96, 64, 8)


def test_widths_of_single_layers_add_up_in_the_form_any():
    model = llama(4)
    before, dense = cached(model), copy.deepcopy(model)
    pruner = PruneTorch(model, {"input_ids": IDS}).set_budget("kv_cache").set_alignment(1).set_form("any")
    pruner.set_importance_evaluation_function("l1").set_allocation("global").prune(0.75, [])
    assert cached(model) / before == pytest.approx(pruner.report()["reached"])
    assert pruner.report()["reached"] == pytest.approx(0.75, abs=0.13)
    for small, large in zip(model.model.layers, dense.model.layers):
        assert small.mlp.up_proj.weight.shape == large.mlp.up_proj.weight.shape


def test_a_network_without_attention_is_refused_and_stays():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    with pytest.raises(ArgumentError, match="attention"):
        PruneTorch(net, torch.ones(1, 8)).set_budget("kv_cache").prune(0.5)
    assert net[0].out_features == 16
