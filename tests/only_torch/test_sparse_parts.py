"""Weights that no module of their own holds: experts in one parameter, the fused projections of attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from slimkit.core.errors import PatternError
from slimkit.core.sparse import SparseConfig
from slimkit.sparse import Compressor, freeze_zeros

import torch
from torch import nn
from torch.nn import functional as F

N_EXPERTS = 3


def moe(family):
    import transformers as hf

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "num_experts_per_tok": 1,
    }
    if family == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=N_EXPERTS, **small)).eval()
    if family == "qwen3_moe":
        config = hf.Qwen3MoeConfig(num_experts=N_EXPERTS, moe_intermediate_size=12, head_dim=8, **small)
        return hf.Qwen3MoeForCausalLM(config).eval()
    config = hf.GptOssConfig(num_local_experts=N_EXPERTS, head_dim=8, **small)
    return hf.GptOssForCausalLM(config).eval()


def tokens(n=3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (4, 16), generator=generator)} for _ in range(n)]


def experts_of(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj")) and p.ndim == 3}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_expert_of_one_parameter_is_a_layer_with_the_tokens_routed_to_it(family):
    model = moe(family)
    router = model.model.layers[0].mlp
    chosen = []
    gate = router.gate if family != "gpt_oss" else router.router
    hook = gate.register_forward_hook(lambda _m, _a, out: chosen.append(out[2]))
    with torch.no_grad():
        for batch in tokens():
            model(**batch)
    hook.remove()
    routed = torch.cat([c.reshape(-1) for c in chosen]).bincount(minlength=N_EXPERTS).tolist()
    implementation = model.config._experts_implementation
    config = SparseConfig(method="hessian", targets=["*.layers.0.mlp.experts.*"], min_tokens=1)
    report = Compressor(model, config).compress(tokens())
    stem = "model.layers.0.mlp.experts."
    assert set(report["layers"]) == {f"{stem}{k}[{e}]" for k in ("gate_up_proj", "down_proj") for e in range(N_EXPERTS)}
    for expert, n in enumerate(routed):
        assert report["layers"][f"{stem}gate_up_proj[{expert}]"]["rows"] == n
        assert report["layers"][f"{stem}down_proj[{expert}]"]["rows"] == n
    assert {n: float((p == 0).float().mean()) for n, p in experts_of(model).items() if "layers.0" in n} == {
        f"{stem}gate_up_proj": 0.5,
        f"{stem}down_proj": 0.5,
    }
    assert model.config._experts_implementation == implementation != "eager"


class Plain(nn.Module):
    """The same experts as modules of their own; what one parameter for all must equal."""

    def __init__(self, transposed):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, N_EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(N_EXPERTS))

    def forward(self, x):
        choice = self.gate(x).argmax(1)
        out = x.new_zeros(len(x), 6)
        for i in choice.unique().tolist():
            out[choice == i] = self.experts[i](x[choice == i])
        return out


class Fused(Plain):
    """All experts in one parameter, asked for one by one."""

    def __init__(self, transposed):
        super().__init__(transposed)
        weights = torch.stack([e.weight.detach() for e in self.experts])
        del self.experts
        self.n_experts, self.transposed = N_EXPERTS, transposed
        self.w = nn.Parameter(weights.mT.contiguous() if transposed else weights)

    def forward(self, x):
        choice = self.gate(x).argmax(1)
        out = x.new_zeros(len(x), 6)
        for i in choice.unique().tolist():
            rows = x[choice == i]
            out[choice == i] = rows @ self.w[i] if self.transposed else F.linear(rows, self.w[i])
        return out


class AtOnce(Fused):
    """All experts in one product, with zeros for the tokens of others."""

    def forward(self, x):
        weight = F.one_hot(self.gate(x).argmax(1), N_EXPERTS).to(x.dtype)
        spread = torch.einsum("ne,nd->end", weight, x)
        return (spread @ (self.w if self.transposed else self.w.mT)).sum(0)


@pytest.mark.parametrize("kind", [Fused, AtOnce])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["hessian", "par"])
def test_experts_in_one_parameter_become_what_experts_of_their_own_become(kind, transposed, method):
    data = [torch.randn(128, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    plain, fused = Plain(transposed), kind(transposed)
    config = SparseConfig(method=method, ignore=["gate"], pattern="2:4")
    expected = Compressor(plain, config).compress(data)
    compressor = Compressor(fused, config)
    report = compressor.compress(data)
    for i, expert in enumerate(plain.experts):
        ours = fused.w[i].mT if transposed else fused.w[i]
        torch.testing.assert_close(ours, expert.weight, atol=1e-6, rtol=0)
        assert ((ours.reshape(6, 2, 4) != 0).sum(2) <= 2).all()
        assert report["layers"][f"w[{i}]"]["rows"] == expected["layers"][f"experts.{i}"]["rows"]
        assert torch.equal(compressor.masks[f"w[{i}]"], fused.w[i] != 0)


def test_the_dense_rows_of_an_expert_are_those_of_the_same_tokens():
    from slimkit.core.sparse.experts import LayerCall, same_tokens

    def use(tokens):
        return LayerCall(torch.tensor(tokens)[:, None] * 10.0, tokens=torch.tensor(tokens))

    ours, dense = same_tokens(use([5, 1, 3]), use([3, 4, 5]))
    assert ours.x.tolist() == dense.x.tolist() == [[30.0], [50.0]]
    ours, dense = same_tokens(use([1]), use([2]))
    assert len(ours.x) == len(dense.x) == 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_fitted_to_the_dense_model_though_routing_changes(family, monkeypatch):
    from slimkit.core.sparse.maths.moments import Moments

    seen = []
    add = Moments.add

    def recorded(self, x, dense=None, drift=None):
        seen.append((self.layer.name, dense is not None and dense.shape == x.shape))
        add(self, x, dense, drift)

    monkeypatch.setattr(Moments, "add", recorded)
    model, dense = moe(family), moe(family)
    with torch.no_grad():
        for each in (model, dense):
            for p in each.parameters():
                if p.ndim > 1:
                    p.mul_(8)  # far enough from zero for routing to change
    config = SparseConfig(method="par", sparse_ratio=0.7, targets=["model.layers"], min_tokens=1)
    report = Compressor(model, config).compress(tokens())
    experts = [same for name, same in seen if "experts" in name]
    assert len(experts) > 12
    assert all(experts)
    rows = sum(row["rows"] for name, row in report["layers"].items() if "layers.1.mlp.experts.down" in name)
    assert 96 < rows < 192  # some tokens went elsewhere


@pytest.mark.parametrize("kind", [Plain, Fused])
def test_experts_count_all_their_rows_whatever_order_batches_call_them_in(kind):
    model = kind(False)
    x = torch.randn(400, 8)
    choice = model.gate(x).argmax(1)
    # Expert 2 is first called before expert 0, and behind it in the second batch.
    data = [x[choice != 0], x[choice != 1]]
    report = Compressor(model, SparseConfig(method="hessian", ignore=["gate"])).compress(data)
    name = "experts.{}" if kind is Plain else "w[{}]"
    for i in range(N_EXPERTS):
        assert report["layers"][name.format(i)]["rows"] == int((choice == i).sum()) * (2 if i == 2 else 1)


def test_experts_that_nobody_chose_fall_back_and_are_named():
    model = Fused(False)
    with torch.no_grad():
        model.gate.weight[2] = model.gate.weight[0] * 1e-3  # never the largest
    report = Compressor(model, SparseConfig(method="wanda", targets=["w"])).compress([torch.randn(64, 8).abs()])
    missed = [n for n, row in report["layers"].items() if row["rows"] < 16]
    assert missed
    assert list(report["fallbacks"]) == missed
    assert all(report["layers"][n]["method"] == "magnitude" for n in missed)
    assert report["ratio"] == 0.5


def test_padding_tokens_do_not_count_for_experts():
    plain, padded = moe("mixtral"), moe("mixtral")
    ids = tokens(1)[0]["input_ids"]
    wide = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    config = SparseConfig(method="wanda", targets=["*.layers.0.mlp.experts.*"], min_tokens=1)
    one = Compressor(plain, config).compress([{"input_ids": ids}])
    two = Compressor(padded, config).compress([{"input_ids": wide, "attention_mask": mask}])
    assert {n: r["rows"] for n, r in one["layers"].items()} == {n: r["rows"] for n, r in two["layers"].items()}
    for a, b in zip(plain.parameters(), padded.parameters()):
        assert ((a == 0) == (b == 0)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_of_gated_experts_is_seen_in_how_they_fit_together(transposed):
    class TwoExperts(nn.Module):
        pass

    model = TwoExperts()
    shapes = {"up": (2, 24, 16), "down": (2, 16, 12)}  # (experts, out, in)
    for name, shape in shapes.items():
        weight = torch.randn(shape)
        model.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))
    report = Compressor(model, SparseConfig(pattern="2:4")).compress()
    assert list(report["layers"]) == ["up[0]", "up[1]", "down[0]", "down[1]"]
    for name, (n, rows, channels) in shapes.items():
        weight = getattr(model, name)
        weight = weight.mT if transposed else weight
        assert ((weight.reshape(n, rows, channels // 4, 4) != 0).sum(3) == 2).all()


def test_weights_of_experts_that_have_no_linear_algebra_are_reported():
    model = Fused(False)
    model.w = nn.Parameter(model.w.detach().to(torch.int8), requires_grad=False)
    report = Compressor(model, SparseConfig()).compress()
    assert set(report["skipped"]) == {"w[0]", "w[1]", "w[2]"}
    assert "int8" in report["skipped"]["w[1]"]


class Spelled(nn.Module):
    """Attention written out with a module for each projection; what nn.MultiheadAttention must equal."""

    def __init__(self, attention):
        super().__init__()
        for i, name in enumerate(("query", "key", "value")):
            layer = nn.Linear(16, 16)
            layer.weight.data, layer.bias.data = (
                t.detach()[16 * i : 16 * (i + 1)].clone() for t in (attention.in_proj_weight, attention.in_proj_bias)
            )
            setattr(self, name, layer)
        self.out = nn.Linear(16, 16)
        self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, q, k, v):
        parts = [layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer, x in zip(self.children(), (q, k, v))]
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["hessian", "par"])
@pytest.mark.parametrize("inputs", ["one", "two", "three"])
def test_attention_is_calibrated_on_its_query_key_and_value(method, inputs):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    nn.init.normal_(model.in_proj_bias)
    spelled = Spelled(model)
    data = []
    for _ in range(3):
        q, k, v = (torch.randn(4, 12, 16) * torch.rand(16) for _ in range(3))
        data.append({"one": (q, q, q), "two": (q, k, k), "three": (q, k, v)}[inputs])
    config = SparseConfig(method=method, pattern="2:4")
    report = Compressor(model, config).compress(data)
    Compressor(spelled, config).compress(data)
    assert [r["rows"] for r in report["layers"].values()] == [144] * 4
    assert not report["fallbacks"]
    whole = torch.cat([spelled.query.weight, spelled.key.weight, spelled.value.weight])
    torch.testing.assert_close(model.in_proj_weight, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.out_proj.weight, spelled.out.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.out_proj.bias, spelled.out.bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.in_proj_bias[:16], spelled.query.bias, atol=1e-5, rtol=0)


def test_attention_with_keys_of_another_width():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, bias=False)
    data = [(torch.randn(5, 4, 16), torch.randn(7, 4, 8), torch.randn(7, 4, 12)) for _ in range(2)]
    report = Compressor(model, SparseConfig(method="hessian")).compress(data)
    rows = {n: r["rows"] for n, r in report["layers"].items()}
    assert rows == {"q_proj_weight": 40, "k_proj_weight": 56, "v_proj_weight": 56, "out_proj": 40}


def test_transformer_encoder_is_seen_in_spite_of_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    report = Compressor(model, SparseConfig(method="par", targets=["layers"])).compress([torch.randn(4, 8, 16)])
    assert {row["rows"] for row in report["layers"].values()} == {32}
    assert len(report["layers"]) == 2 * 6
    assert report["fallbacks"] == report["skipped"] == {}
    assert float((model.layers[1].self_attn.in_proj_weight == 0).float().mean()) == 0.5


def test_parts_are_chosen_by_name():
    model = nn.MultiheadAttention(16, 2)
    report = Compressor(model, SparseConfig(targets=["in_proj_weight"], ignore=["*[value]"])).compress()
    assert list(report["layers"]) == ["in_proj_weight[query]", "in_proj_weight[key]"]
    assert report["ignored"] == ["in_proj_weight[value]", "out_proj"]
    assert bool((model.in_proj_weight[32:] != 0).all())
    with pytest.raises(PatternError, match="in_proj_weight"):
        Compressor(model, SparseConfig(targets=["in_proj_weigt"])).compress()


@pytest.mark.parametrize("by_masks", [False, True])
def test_zeros_of_parts_stay_in_training(by_masks):
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.moe = nn.MultiheadAttention(8, 2), Fused(False)

        def forward(self, x):
            return self.moe(self.attention(x, x, x)[0].flatten(0, 1))

    model = Both()
    compressor = Compressor(model, SparseConfig(ignore=["attention.in_proj_weight[key]"]))
    compressor.compress()
    before = copy.deepcopy(model)
    zeros = freeze_zeros(model, compressor.masks if by_masks else None)
    assert set(zeros.masks) == set(compressor.masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 5, 8)).square().mean().backward()
        optimizer.step()
    for (name, old), new in zip(before.named_parameters(), model.parameters()):
        if old.ndim > 1 and name != "moe.gate.weight":  # which expert is largest has no gradient
            assert torch.equal(old == 0, new == 0), name
            assert not torch.equal(old, new), name
    model.attention.out_proj.weight.data.fill_(1.0)
    model(torch.randn(6, 5, 8))
    assert np.isclose(float((model.attention.out_proj.weight == 0).float().mean()), 0.5)
    zeros.remove()


def test_an_error_leaves_experts_and_attention_as_they_were():
    model = nn.Sequential(Fused(False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        Compressor(model, SparseConfig(method="hessian")).compress([torch.randn(64, 8), torch.randn(3, 5)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
