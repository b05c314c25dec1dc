"""PruneTorch as a user meets it: budgets, limits, errors, files, and what surrounds a pruned model."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, FileFormatError, GraphError, PatternError, PlanError, UnsupportedError
from slimkit.prune import PruneTorch, load_pruned, save_pruned
from slimkit.trace import trace
from tests.zoo import language, oracle, vision

import torch
import torch.nn.functional as F
from torch import nn


def chain(width=64):
    net = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    )  # fmt: skip
    return net.eval(), torch.randn(2, 3, 12, 12)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in now)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_analysis_leaves_the_model_alone_and_counts_exactly():
    net, x = chain()
    before, modes = state(net), [m.training for m in net.modules()]
    left, desc = PruneTorch(net, x).analysis(0.6)
    assert same_state(net, before)
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    PruneTorch(net, x).prune_by_desc(desc)
    assert count(net) == left


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_default_alignment_of_16_still_hits_the_target(ratio):
    net, x = chain(192)
    job = PruneTorch(net, x)
    desc = job.prune(ratio)
    assert abs(job.report()["reached"] - ratio) <= 0.02
    assert all(len(v["keep"]) % 16 == 0 for v in desc["variables"].values())


def test_macs_budget():
    net, x = chain(96)
    job = PruneTorch(net, x).set_budget("macs").set_alignment(4)
    job.prune(0.5)
    assert abs(job.report()["reached"] - 0.5) <= 0.02

    def macs(model):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops() / 2

    assert abs(macs(net) / macs(chain(96)[0]) - 0.5) <= 0.02


def test_unreachable_target_names_what_holds_it_back(caplog):
    net, x = chain()
    job = PruneTorch(net, x).set_node_reserved_ratio(0.9)
    job.prune(0.2)
    assert job.report()["reached"] > 0.2
    assert job.report()["held_back"]
    assert "holds it back" in caplog.text


def test_first_and_last_layer_stay_whole_by_default_and_names_are_understood():
    net, x = chain()
    PruneTorch(net, x).prune(0.5)
    assert net[0].out_channels == 64
    assert net[3].out_channels < 64
    net, x = chain()
    PruneTorch(net, x).prune(0.8, ["3", "5*"])
    assert net[0].out_channels < 64
    assert net[3].out_channels == net[5].out_channels == 64
    with pytest.raises(PatternError, match="nothere"):
        PruneTorch(net, x).analysis(0.5, ["nothere"])
    with pytest.raises(ArgumentError, match="un_prune_list"):
        PruneTorch(net, x).analysis(0.5, [99])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p: p.analysis(0), ArgumentError),
        (lambda p: p.analysis(1.5), ArgumentError),
        (lambda p: p.analysis("half"), TypeError),
        (lambda p: p.analysis(0.5, "0"), TypeError),
        (lambda p: p.set_node_reserved_ratio(1.0), ArgumentError),
        (lambda p: p.set_alignment(0), ArgumentError),
        (lambda p: p.set_alignment(True), TypeError),
        (lambda p: p.set_budget("bytes"), ArgumentError),
        (lambda p: p.set_importance_evaluation_function("l3"), ArgumentError),
        (lambda p: p.set_importance_evaluation_function("taylor"), ArgumentError),
        (lambda p: p.set_allocation("best"), ArgumentError),
        (lambda p: p.set_compensation(7), TypeError),
        (lambda p: p.prune_by_desc([]), TypeError),
        (lambda p: p.prune_by_desc({"format": "other"}), PlanError),
    ],
)
def test_wrong_arguments_are_refused(call, error):
    net, x = chain()
    before = state(net)
    with pytest.raises(error):
        call(PruneTorch(net, x))
    assert same_state(net, before)


def test_a_model_that_is_none_and_missing_inputs_are_refused():
    with pytest.raises(TypeError, match="network"):
        PruneTorch("net", torch.ones(1))
    with pytest.raises(ArgumentError, match="inputs"):
        PruneTorch(nn.ReLU()).analysis()
    with pytest.raises(GraphError, match="does not run"):
        PruneTorch(chain()[0], torch.ones(1, 4, 8, 8)).analysis()


def test_desc_of_another_model_names_the_first_mismatch_and_changes_nothing():
    net, x = chain()
    _, desc = PruneTorch(net, x).analysis(0.5)
    other, _ = chain(48)
    before = state(other)
    with pytest.raises(PlanError, match=r"'0.weight' of shape \[64, 3, 3, 3\].*\[48, 3, 3, 3\]"):
        PruneTorch(other, x).prune_by_desc(desc)
    assert same_state(other, before)
    with pytest.raises(PlanError, match="version"):
        PruneTorch(net, x).prune_by_desc({**desc, "version": 99})
    broken = json.loads(json.dumps(desc))
    next(iter(broken["variables"].values()))["keep"].reverse()
    with pytest.raises(PlanError, match="ascending"):
        PruneTorch(net, x).prune_by_desc(broken)


def test_an_error_in_the_cut_takes_everything_back(monkeypatch):
    net, x = chain()
    before, widths = state(net), [m.out_channels for m in net if isinstance(m, nn.Conv2d)]
    from slimkit import surgery

    calls = []
    real = surgery.select

    def fails_late(tensor, axes):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("no room")
        return real(tensor, axes)

    monkeypatch.setattr(surgery, "select", fails_late)
    with pytest.raises(MemoryError):
        PruneTorch(net, x).prune(0.5)
    assert same_state(net, before)
    assert [m.out_channels for m in net if isinstance(m, nn.Conv2d)] == widths


def test_save_and_load_pruned(tmp_path):
    model, inputs = language.build("qwen2")  # tied embeddings
    fresh = copy.deepcopy(model)
    desc = oracle.pruner(model, inputs).prune(0.7, [])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_pruned(tmp_path / "small", model, desc)
    load_pruned(tmp_path / "small", fresh)
    with torch.no_grad():
        assert torch.equal(oracle.call(fresh, inputs), oracle.call(model, inputs))
    (tmp_path / "small" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(FileFormatError):
        load_pruned(tmp_path / "small", language.build("qwen2")[0])
    with pytest.raises(FileFormatError, match="must be the one that desc pruned"):
        save_pruned(tmp_path / "other", language.build("qwen2")[0], desc)


def test_hugging_face_configuration_says_the_new_widths():
    import transformers

    model, inputs = language.build("llama")
    oracle.pruner(model, inputs).prune(0.6, [])
    rebuilt = transformers.LlamaForCausalLM(model.config)
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(oracle.call(rebuilt.eval(), inputs), oracle.call(model, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit", "mixtral"])
def test_a_configuration_that_says_it_all_builds_the_pruned_model(name):
    model, inputs = language.build(name)
    job = oracle.pruner(model, inputs)
    assert "from_config" not in job.report()
    job.prune(0.6, [])
    assert job.report()["from_config"] == {"loads": True, "because": ""}
    type(model)(model.config).load_state_dict(model.state_dict())


def test_the_report_says_what_a_configuration_cannot_say():
    """BERT's heads are as large as hidden size over heads: only the feed-forward width can be said alone."""
    model, inputs = language.build("bert")
    job = oracle.pruner(model, inputs).set_form("any")
    job.prune(0.6, [])
    found = job.report()["from_config"]
    assert not found["loads"]
    assert "the configuration says" in found["because"]

    model, inputs = language.build("bert")
    job = oracle.pruner(model, inputs).set_form("any")
    before = model.config.intermediate_size
    job.prune(0.9, ["*.query", "*.key", "*.value", "*.output.dense", "*.pooler.dense"])
    assert job.report()["from_config"]["loads"]
    assert model.config.intermediate_size < before


def test_a_failed_compensation_leaves_no_word_of_a_cut():
    model, inputs = language.build("llama")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    job = oracle.pruner(model, inputs).set_compensation([{"input_ids": "no tensor"}])
    with pytest.raises(TypeError, match="indices"):
        job.prune(0.6, [])
    assert shapes == {n: p.shape for n, p in model.named_parameters()}
    assert "from_config" not in job.report()


@pytest.mark.parametrize("name", ["lamp", "l2", "bn_scale", "random", "taylor", "hessian", "activation"])
def test_every_importance_prunes(name):
    net, x = chain()
    job = PruneTorch(net, x).set_alignment(1).set_importance_evaluation_function(name, calibration=[x, x])
    for allocation in ("uniform", "global"):
        _, desc = job.set_allocation(allocation).analysis(0.5, [-1])
        assert abs(job.report()["reached"] - 0.5) <= 0.02
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert desc["made"]["importance"] == name


def test_a_function_of_one_channel_decides():
    net, x = chain()
    with torch.no_grad():
        net[3].weight[:8] *= 100
    job = PruneTorch(net, x).set_importance_evaluation_function(lambda w: float(np.square(w).sum()))
    _, desc = job.analysis(0.5)
    kept = next(v["keep"] for n, v in desc["variables"].items() if "3" in job.report()["variables"][n]["layers"])
    assert kept[:8] == list(range(8))


def test_bn_scale_needs_a_norm():
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    with pytest.raises(UnsupportedError, match="bn_scale"):
        PruneTorch(net, torch.ones(1, 4)).set_importance_evaluation_function("bn_scale").analysis(0.5)


def test_operator_without_a_rule_keeps_its_axes_and_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.cdist(self.a(x), self.a(x)) @ self.a(x))))

    net, x = Odd().eval(), torch.randn(2, 5, 8)
    job = PruneTorch(net, x).set_alignment(4)
    job.prune(0.7, [])
    assert any("cdist" in line for line in job.report()["without_rule"])
    assert net.a.out_features == 32
    assert net.b.out_features < 32
    assert net(x).shape == (2, 5, 4)


def test_control_flow_that_looks_at_activations_is_followed_for_real():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = torch.relu(self.a(x))
            if x.sum() > -1:
                x = torch.relu(self.b(x))
            return self.c(x)

    net, x = Branch().eval(), torch.randn(3, 8)
    assert trace(net, x).real
    oracle.check(net, x, 0.6)


def test_experts_that_the_example_did_not_reach_still_fit():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.c = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)
            )

        def forward(self, x):
            x = self.a(x)
            best = self.gate(x).argmax(-1)
            out = torch.zeros_like(x)
            for k in range(4):
                rows = best == k
                if rows.any():
                    out[rows] = self.experts[k](x[rows])
            return self.c(x + out)

    torch.manual_seed(0)
    net, x = Experts().eval(), torch.randn(1, 8)
    job = PruneTorch(net, x).set_alignment(4)
    job.prune(0.6, [])
    assert len([n for n in job.report()["notes"] if "did not run" in n]) == 12
    assert len({e[0].in_features for e in net.experts}) == 1
    assert net.a.out_features < 32
    assert net(torch.randn(64, 8)).shape == (64, 3)


def test_caches_in_modules_are_not_left_without_values():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.seen, self.table = nn.Linear(8, 32), nn.Linear(32, 2), {}, None

        def forward(self, x):
            self.seen[len(x)] = x
            self.table = self.a(x)
            return self.b(torch.relu(self.table))

    net = Caching().eval()
    PruneTorch(net, torch.randn(2, 8)).set_alignment(4).prune(0.6, [])
    assert net.seen == {}
    assert net.table is None


def test_shared_modules_and_tied_weights_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.again = nn.Embedding(30, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.again.weight = self.mix.weight
            self.head = nn.Linear(64, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(torch.relu(self.again(torch.relu(self.mix(self.mix(self.table(ids)))))))

    net, ids = Shared().eval(), torch.randint(0, 30, (2, 5))
    small, _, _ = oracle.check(net, ids, 0.6, hidden=True)
    assert small.head.weight is small.table.weight
    assert small.again.weight is small.mix.weight
    assert small.head.in_features == small.table.embedding_dim == small.mix.out_features < 64


def test_pruned_attention_keeps_masks_weights_and_deepcopy():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x, padding = torch.randn(2, 6, 64), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    desc = PruneTorch(net, x).set_alignment(1).prune(0.8, [])
    assert net.self_attn.num_heads * net.self_attn.head_dim == net.self_attn.out_proj.in_features
    whole = copy.deepcopy(net)
    assert desc["variables"]
    with torch.no_grad():
        out = net(x, src_mask=causal, src_key_padding_mask=padding)
        assert torch.equal(whole(x, src_mask=causal, src_key_padding_mask=padding), out)
        mixed, weights = net.self_attn(x, x, x, key_padding_mask=padding, attn_mask=causal)
    assert torch.isfinite(out).all()
    assert weights.shape == (2, 6, 6)
    np.testing.assert_allclose(weights.sum(-1).numpy(), 1, atol=1e-5)  # float32 softmax
    assert float(weights[1, :, 4:].max()) == 0.0
    assert mixed.shape == x.shape


def test_pruned_model_exports_trains_and_copies(tmp_path):
    net, x = vision.build("resnet")
    oracle.pruner(net, x).prune(0.5)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))
    import onnxruntime

    torch.onnx.export(net, (x,), str(tmp_path / "net.onnx"), dynamo=False, opset_version=13)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, net(x).detach().numpy(), atol=1e-4)  # float32, another kernel library
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    target = torch.randint(0, 10, (2,))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_compensation_brings_the_output_back():
    torch.manual_seed(0)
    net, _ = chain()
    data = [torch.randn(8, 3, 12, 12) for _ in range(4)]
    held_out = torch.randn(8, 3, 12, 12)
    errors = []
    for repair in (None, data):
        small = copy.deepcopy(net)
        PruneTorch(small, data[0]).set_alignment(4).set_compensation(repair).prune(0.5)
        with torch.no_grad():
            errors.append(float((small(held_out) - net(held_out)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_an_error_in_compensation_takes_the_cut_back():
    net, x = chain()
    before = state(net)
    with pytest.raises(RuntimeError):
        PruneTorch(net, x).set_compensation([torch.randn(2, 4, 12, 12)]).prune(0.5)
    assert same_state(net, before)
    assert net[3].out_channels == 64


def test_large_language_model_is_analysed_without_memory():
    import transformers

    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, vocab_size=32000)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    left, _ = PruneTorch(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}).analysis(0.7, [])
    assert abs(left / count(model) - 0.7) <= 0.02
    assert next(model.parameters()).device.type == "meta"


def test_picture_and_report(tmp_path):
    net, x = chain()
    job = PruneTorch(net, x)
    job.analysis(0.5)
    text = job.draw(tmp_path / "groups.html")
    assert text.startswith("<svg")
    assert text in (tmp_path / "groups.html").read_text()
    report = json.loads(json.dumps(job.report()))
    assert report["params"] == count(net)
    assert report["variables"]["d0"]["layers"] == ["3"]
    assert report["whole"]["output of the model"] == ["9.weight:0", "9.bias:0"]
