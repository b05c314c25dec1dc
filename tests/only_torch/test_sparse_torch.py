"""What sparsity does with torch models alone: Hugging Face layers, blocks, experts, dtypes, processes."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError
from slimkit.core.sparse import SparseConfig
from slimkit.sparse import Compressor, framework, freeze_zeros

import torch


def small_bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    return BertModel(config).eval()


def tokens(n=3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=generator)} for _ in range(n)]


def test_blocks_fed_from_memory_equal_whole_forwards(monkeypatch):

    by_block, whole = small_bert(), small_bert()
    config = SparseConfig(method="par", ignore=["pooler*"])
    Compressor(by_block, config).compress(tokens())
    monkeypatch.setattr(framework, "block_paths", lambda *_: [])
    Compressor(whole, config).compress(tokens())
    for a, b in zip(by_block.parameters(), whole.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # the same numbers by another road


def test_measured_ratios_of_attention_and_mlp_blocks_cost_less_than_half_a_run():
    ran = []
    for uniform in (True, False):
        model, calls = small_bert(), {"blocks": 0, "whole": 0}

        def count(module, *_, model=model, calls=calls):
            calls["whole" if module is model else "blocks"] += 1

        for module in (*model.encoder.layer, model):
            module.register_forward_pre_hook(count)
        Compressor(model, SparseConfig(method="wanda", uniform=uniform, ignore=["pooler*"])).compress(tokens(8))
        ran.append(calls)
    assert ran[1]["blocks"] < 1.5 * ran[0]["blocks"]
    # A batch that measures: its order of calls. Then one that judges: dense, with equal and with measured ratios.
    assert ran[1]["whole"] == ran[0]["whole"] + 1 + 3


def test_padding_tokens_do_not_count():
    plain, padded = small_bert(), small_bert()
    ids = tokens(1)[0]["input_ids"]
    wide = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    config = SparseConfig(method="wanda", ignore=["pooler*"])
    one = Compressor(plain, config).compress([{"input_ids": ids}])
    two = Compressor(padded, config).compress([{"input_ids": wide, "attention_mask": mask}])
    assert {n: r["rows"] for n, r in one["layers"].items()} == {n: r["rows"] for n, r in two["layers"].items()}
    for a, b in zip(plain.parameters(), padded.parameters()):
        assert ((a == 0) == (b == 0)).all()


class Experts(torch.nn.Module):
    """Four experts; a row goes to the one its first entry names."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        choice = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 2.4).long()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (choice == i).any():
                out[choice == i] = expert(x[choice == i])
        return out


def test_experts_that_saw_few_tokens_are_named_and_fall_back():
    torch.manual_seed(0)
    model = Experts()
    report = Compressor(model, SparseConfig(method="par")).compress([torch.randn(64, 8) for _ in range(4)])
    assert set(report["fallbacks"]) <= {"experts.2", "experts.3"}
    assert report["fallbacks"]
    assert report["ratio"] == 0.5
    assert report["layers"]["experts.0"]["method"] == "par"


def test_tied_embeddings_are_left_alone_and_reported():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(16, 8)
            self.inner = torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 16, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.inner(self.table(ids)))

    model = Tied()
    report = Compressor(model, SparseConfig(method="hessian")).compress([torch.randint(0, 16, (8, 8))])
    assert "tied" in report["skipped"]["head"]
    assert (model.table.weight != 0).all()
    with pytest.raises(ArgumentError, match="tied"):
        Compressor(model, SparseConfig(targets=["head"])).compress()


def test_a_shared_layer_is_calibrated_on_all_its_calls():
    layer = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
    report = Compressor(model, SparseConfig(method="hessian")).compress([torch.randn(64, 8)])
    assert report["layers"]["0"]["rows"] == 128
    assert list(report["layers"]) == ["0"]


class Shared(torch.nn.Module):
    """Two layers with one weight and biases of their own, or one without."""

    def __init__(self, biases):
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)
        self.one, self.two = (torch.nn.Linear(16, 16, bias=bias) for bias in biases)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.relu(self.inner(x))
        return self.one(x) - 0.5, self.two(x + 1)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)])
def test_layers_that_share_a_weight_have_their_biases_shifted_alike(biases):
    torch.manual_seed(0)
    model = Shared(biases)
    dense, before = copy.deepcopy(model), {n: p.clone() for n, p in model.named_parameters()}
    data = [torch.randn(64, 16) for _ in range(4)]
    Compressor(model, SparseConfig(method="par", sparse_ratio=0.6)).compress(data)
    shifts = [
        layer.bias - before[f"{name}.bias"]
        for name, layer in (("one", model.one), ("two", model.two))
        if layer.bias is not None
    ]
    if all(biases):
        torch.testing.assert_close(shifts[0], shifts[1], atol=1e-6, rtol=0)  # float32 sums
        assert shifts[0].abs().max() > 1e-3
        # Over both calls, whose rows count alike, the mean of the answers is the dense one's.
        with torch.no_grad():
            off = sum((a - b).mean(0) for x in data for a, b in zip(model(x), dense(x)))
        assert off.abs().max() < 1e-4
    else:  # no bias could say it for both
        assert not any(shift.any() for shift in shifts)


def test_an_error_brings_back_the_biases_of_all_that_share_a_weight(monkeypatch):
    torch.manual_seed(0)
    model = Shared((True, True))
    before = {n: p.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(framework.TorchSparse, "settled", lambda self, name, row: 1 / (name != "one"))
    with pytest.raises(ZeroDivisionError):
        Compressor(model, SparseConfig(method="par")).compress([torch.randn(64, 16)])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs_and_lose_nothing(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16)).to(dtype)
    data = [torch.randn(256, 32).to(dtype)]
    reference = copy.deepcopy(model).float()
    report = Compressor(model, SparseConfig(method="hessian")).compress(data)
    Compressor(reference, SparseConfig(method="hessian")).compress([d.float() for d in data])
    assert model[0].weight.dtype == dtype
    assert report["ratio"] == 0.5
    assert ((model[0].weight == 0) == (reference[0].weight == 0)).all()


def test_integer_weights_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    report = Compressor(model, SparseConfig()).compress()
    assert "int8" in report["skipped"]["1"]


def test_modes_and_caches_come_back():
    model = small_bert().train()
    model.encoder.layer[1].eval()
    Compressor(model, SparseConfig(method="wanda")).compress(tokens(1))
    assert model.training
    assert not model.encoder.layer[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_frozen_zeros_outlive_a_merged_lora():
    from slimkit.delta import apply_delta, merge_delta

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    compressor = Compressor(model, SparseConfig())
    compressor.compress()
    zeros = freeze_zeros(model)
    apply_delta(model, "lora", targets=["0"], rank=2, alpha=4)
    for parameter in model.parameters():
        if parameter.shape == (8, 2):
            torch.nn.init.ones_(parameter)
    merge_delta(model)
    zeros.apply()
    weight = next(p for p in model.parameters() if p.shape == (8, 8))
    assert int((weight == 0).sum()) == 32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nm", [None, (2, 4), (3, 8)])
def test_numpy_and_torch_run_the_same_text(nm, dtype):
    from slimkit.core.sparse.maths.factor import inverse_factor
    from slimkit.core.sparse.maths.pattern import NM
    from slimkit.core.sparse.maths.sweep import sweep

    rng = np.random.default_rng(0)
    n = 520  # more than a leaf of the factorisation, and no multiple of a block
    x = rng.standard_normal((1200, n)).astype(dtype)
    gram, weight = x.T @ x / 1200, rng.standard_normal((n, 100)).astype(dtype)
    pattern = NM(*nm) if nm else None
    by_numpy, by_torch = weight.copy(), torch.from_numpy(weight.copy())
    keep, loss = sweep(by_numpy, inverse_factor(gram, 0.01)[0], 0.5, pattern, 128)
    again, same = sweep(by_torch, inverse_factor(torch.from_numpy(gram), 0.01)[0], 0.5, pattern, 128)
    differ = keep != again.numpy()
    assert differ.mean() <= (0.001 if dtype == "float32" else 0)  # float ties of another order of summation
    rows = ~differ.any(axis=0)  # outputs; each is a problem of its own once its mask is chosen
    np.testing.assert_allclose(by_numpy[:, rows], by_torch.numpy()[:, rows], atol=1e-4 if dtype == "float32" else 1e-10)
    assert abs(loss - same) < 1e-3 * loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_place_where_outputs_join_the_residual_stream_is_found(family):
    from slimkit.sparse.residual import joints

    if family == "bert":
        model = small_bert()
        block, hidden = model.encoder.layer[0], torch.randn(2, 5, 32)
        layers = ["attention.self.query", "attention.output.dense", "output.dense"]
        expected = {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"}
        call = {}
    else:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        model = LlamaModel(
            LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
        ).eval()
        block, hidden = model.layers[0], torch.randn(2, 5, 32)
        layers = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
        expected = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}
        call = {"position_embeddings": model.rotary_emb(hidden, torch.arange(5)[None])}
    with torch.no_grad():
        assert joints(block, lambda: block(hidden, **call), layers) == expected


def test_what_the_residual_stream_has_lost_is_fitted_too():
    from slimkit.core.sparse.maths.layer import SparseLayer
    from slimkit.core.sparse.maths.moments import Moments
    from slimkit.core.sparse.maths.solve import solve

    generator = torch.Generator().manual_seed(0)
    x, lost = torch.randn(2000, 16, generator=generator), torch.randn(16, 8, generator=generator) / 4
    weight, drift = torch.randn(8, 16, generator=generator), x @ lost + 0.5
    moments = Moments(SparseLayer("l", "linear", (8, 16), has_bias=True), paired=True)
    for part in range(2):
        rows = slice(1000 * part, 1000 * (part + 1))
        moments.add(x[rows], x[rows], drift[rows])
    solved = solve(moments.layer, weight, moments, 0.01, SparseConfig(method="par"))
    got = x @ solved.weight.float().T + solved.bias_shift.float()
    assert float((got - (x @ weight.T + drift)).norm() / drift.norm()) < 0.1  # 1 % of the weights are gone


def test_blocks_of_a_residual_model_end_nearer_to_the_dense_one():
    error = []
    for residual in (True, False):
        model, dense = small_bert(), small_bert()
        config = SparseConfig(method="par", sparse_ratio=0.7, ignore=["pooler*"], residual=residual)
        Compressor(model, config).compress(tokens(12))
        with torch.no_grad():
            error.append(sum(float((model(**b)[0] - dense(**b)[0]).square().sum()) for b in tokens(12)))
    assert error[0] < 0.95 * error[1]
