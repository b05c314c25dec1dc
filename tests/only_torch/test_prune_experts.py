"""Experts that go: which, how many, and that what is left answers as the dense model with the others never chosen."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from unittest import mock

import pytest

from slimkit import PruneTorch
from slimkit.core.prune.experts import KEPT_WHOLE
from slimkit.expert_calls import expert_call
from tests.only_torch.test_prune_forms import ALONE

import torch
from torch import nn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 48},
    "GptOss": {"num_local_experts": 8, "layer_types": ["full_attention"] * 2},
}
IDS = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0, 1)}]


def built(family, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **sizes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model


def pruner(model, calibrated=True):
    job = PruneTorch(model, {"input_ids": IDS[:2]}).set_compensation(None)
    return job.set_importance_evaluation_function("auto", calibration=BATCHES) if calibrated else job


def kept(job, kind="experts"):
    return [v["keep"] for v in job.report()["variables"].values() if v["kind"] == kind]


@contextlib.contextmanager
def never_chosen(model, desc):
    """The dense model, with the logits of dropped experts at minus infinity."""
    plain, gone = torch.nn.functional.linear, {}
    parameters = dict(model.named_parameters())
    for path, (first, *_) in desc["axes"].items():
        if path.endswith(("gate.weight", "router.weight")) and isinstance(first, str):
            variable = desc["variables"][first]
            gone[id(parameters[path])] = sorted(set(range(variable["size"])) - set(variable["keep"]))

    def linear(x, weight, bias=None):
        said = plain(x, weight, bias)
        if id(weight) in gone:
            said[..., gone[id(weight)]] = -torch.inf
        return said

    assert gone
    with mock.patch.object(torch.nn.functional, "linear", linear), torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_the_dense_model_that_never_chooses_the_others(family, tmp_path):
    model = built(family)
    dense = copy.deepcopy(model)
    job = pruner(model)
    desc = job.prune(0.7, ["*.self_attn.*"])
    assert kept(job) == [5, 5]  # the configuration has one number for all layers
    assert {field: after for field, (_, after) in desc["config"].items() if "experts" in field} == {
        "num_local_experts": 5
    }
    assert {v["kind"] for v in job.report()["variables"].values() if v["keep"] < v["size"]} == {"experts"}
    with never_chosen(dense, desc):
        wanted = dense(input_ids=IDS).logits
    with torch.no_grad():
        # float32, sums of the same products in another order
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.save({"input_ids": IDS}, tmp_path / "inputs.pt")
    if family == "Mixtral":
        subprocess.run([sys.executable, "-I", "-c", ALONE, tmp_path, "AutoModelForCausalLM"], check=True, cwd=tmp_path)
        again = torch.load(tmp_path / "alone.pt")
    else:
        with torch.no_grad():
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


def test_fewer_experts_than_a_token_was_given_to():
    model = built("Qwen3Moe", num_experts_per_tok=4, output_router_logits=True)
    dense = copy.deepcopy(model)
    desc = pruner(model).prune(0.45, ["*.self_attn.*"])
    left = model.config.num_experts
    assert left < 4
    assert model.config.num_experts_per_tok == left
    assert model.num_experts == left
    with never_chosen(dense, desc):
        wanted = dense(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_those_go_that_say_least_for_their_share():
    model = built("Mixtral")
    with torch.no_grad():
        for block, quiet in zip(model.model.layers, (1, 6)):
            block.mlp.experts.down_proj[quiet] *= 1e-3
            block.mlp.gate.weight[quiet] *= 0.1
    job = pruner(model)
    _, desc = job.analysis(0.92, ["*.self_attn.*"])
    gone = [sorted(set(range(8)) - set(v["keep"])) for v in desc["variables"].values()]
    assert gone == [[1], [6]]
    assert desc["made"]["foretold_loss"] < 1e-3
    assert model.config.num_local_experts == 8


def test_experts_stay_without_data_and_where_they_are_named():
    job = pruner(built("Mixtral"), calibrated=False).set_importance_evaluation_function("l1")
    job.analysis(0.8, [])
    report = job.report()
    assert "model.layers.0.mlp.gate.weight:0" in report["whole"][KEPT_WHOLE]
    assert not kept(job)
    job = pruner(built("Mixtral"))
    job.analysis(0.8, ["model.layers.0.mlp.experts", "*.self_attn.*"])
    assert kept(job) == [8]  # one number for all layers: what stays in one stays in the other
    job = pruner(built("Mixtral")).set_form("any")
    job.analysis(0.8, ["model.layers.0.mlp.experts", "*.self_attn.*"])
    assert len(kept(job)) == 1
    assert kept(job)[0] < 8


def test_code_that_cannot_do_with_fewer_experts_keeps_them_and_nothing_else():
    class Fixed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("order", torch.arange(8.0), persistent=False)

        @property
        def weight(self):
            return self.inner.weight

        def forward(self, hidden):
            logits, shares, chosen = self.inner(hidden)
            return logits + self.order, shares, chosen

    model = built("Mixtral")
    block = model.model.layers[0].mlp
    block.gate = Fixed(block.gate)
    job = pruner(model).set_form("any")
    job.analysis(0.6, [])
    assert kept(job) == [kept(job)[0]]  # those of the other layer
    assert kept(job)[0] < 8
    assert len(kept(job, "heads")) == 2


@pytest.mark.parametrize(("dtype", "alignment"), [(torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float32, 1)])
def test_widths_inside_experts_keep_rows_that_a_grouped_product_takes(dtype, alignment):
    model = built("Qwen3Moe", hidden_size=64).to(dtype)
    job = pruner(model, calibrated=False).set_alignment(alignment).set_importance_evaluation_function("l1")
    job.prune(0.7, [])
    held = model.model.layers[0].mlp.experts
    assert held.down_proj.shape[-1] < 48
    assert held.down_proj.shape[-1] % 8 == held.gate_up_proj.shape[-1] % 8 == 0
    assert model.config.num_attention_heads < 4 or model.config.hidden_size < 64
    model.to(torch.bfloat16)(input_ids=IDS)  # a model may be loaded in half precision


def test_a_module_that_is_called_in_another_way_has_no_signal():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.ones(4, 8, 8))

        def forward(self, hidden, shares):
            return hidden

    assert expert_call(Odd(), (torch.ones(3, 8), torch.ones(3, 4)), {}, torch.ones(3, 8)) is None


def test_experts_that_a_router_sorts_into_groups_stay_and_are_told():
    """With six of eight each group would be another one: the router would choose otherwise, and nothing would fail."""
    sizes = {"n_routed_experts": 8, "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1}
    for groups in (2, 1):
        job = pruner(built("Glm4Moe", **sizes, n_group=groups, first_k_dense_replace=0))
        job.analysis(0.7, [])
        assert [k < 8 for k in kept(job)] == ([] if groups == 2 else [True, True])
        assert any("chooses among groups" in note for note in job.report()["notes"]) is (groups == 2)
