"""nn.MultiheadAttention and what is made of it: heads are cut like torch's, compiled once a plan, in silence."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import slimkit_ms
from slimkit.core.prune.plan import PrunePlan
from slimkit_ms.attention import PrunedMultiheadAttention
from slimkit_ms.trace import mindir
from slimkit_ms.trace.spelling import spelled_out
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


class Encoder(nn.Cell):
    def __init__(self):
        super().__init__()
        self.into = nn.Dense(6, 32)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
        self.head = nn.Dense(32, 5)

    def construct(self, x):
        return self.head(self.body(self.into(x)).mean(1))


class Both(nn.Cell):
    """Encoder and decoder: attention over itself and over another's tokens."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Dense(6, 16), nn.Dense(16, 5)
        self.body = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)

    def construct(self, x):
        x = self.into(x)
        return self.head(self.body(x, x).mean(1))


class Forms(nn.Cell):
    """Masks, extra keys, separate projections and the weights of attention."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Dense(6, 16), nn.Dense(16, 5)
        self.own = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.other = nn.MultiheadAttention(16, 4, kdim=6, vdim=6, has_bias=False)

    def construct(self, x, mask, padding):
        y = self.into(x)
        z, weights = self.own(y, y, y, key_padding_mask=padding, attn_mask=mask)
        last = self.other(y.swapaxes(0, 1), x.swapaxes(0, 1), x.swapaxes(0, 1), need_weights=False)[0]
        return self.head((z + last.swapaxes(0, 1)).mean(1)) + weights.mean()


def inputs(name):
    x = zoo_ms.images(2, 7, 6)
    if name != "forms":
        return (x,)
    hidden = np.zeros((2, 7), bool)
    hidden[1, 5:] = True
    return x, ms.Tensor(np.triu(np.ones((7, 7), bool), 1)), ms.Tensor(hidden)


NETS = {"encoder": Encoder, "both": Both, "forms": Forms}
# Layer norms see every feature, so that the oracle wants the hidden width whole.
WIDTH = {"encoder": ["into", "*.out_proj", "*.dense2"], "both": ["into", "*.out_proj", "*.dense2"], "forms": []}


@pytest.mark.parametrize("name", list(NETS))
def test_our_spelling_says_the_same(name):
    net = zoo_ms.randomise(NETS[name]())
    net.set_train(False)
    wanted = net(*inputs(name)).asnumpy()
    with spelled_out(net):
        np.testing.assert_allclose(net(*inputs(name)).asnumpy(), wanted, atol=1e-5)  # float32, sums of 32 products
    assert not any(isinstance(cell, PrunedMultiheadAttention) for _, cell in net.cells_and_names())


@pytest.mark.parametrize("name", list(NETS))
def test_pruned_equals_zeroed_and_is_compiled_once_a_plan(name, monkeypatch):
    net = zoo_ms.randomise(NETS[name]())
    net.set_train(False)
    oracle, compiled = copy.deepcopy(net), []
    export = mindir._export
    monkeypatch.setattr(mindir, "_export", lambda *args: compiled.append(1) or export(*args))
    pruner = slimkit_ms.PruneMindSpore(net, inputs(name)).set_alignment(1)
    before = sum(p.size for p in net.trainable_params())
    desc = pruner.prune(0.75, [*WIDTH[name], "head"] if WIDTH[name] else ["into", "head"])
    assert len(compiled) == 2  # the trace, and the proof of the one plan
    assert sum(p.size for p in net.trainable_params()) < 0.9 * before
    heads = {cell.num_heads for _, cell in net.cells_and_names() if isinstance(cell, nn.MultiheadAttention)}
    assert max(heads) < 4
    for p in oracle.get_parameters():
        index = PrunePlan(desc).indices.get(p.name, ())
        values = p.asnumpy().copy()
        for axis, kept in enumerate(index):
            if kept is not None:
                values[(slice(None),) * axis + (np.setdiff1d(np.arange(p.shape[axis]), kept),)] = 0
        p.set_data(ms.Tensor(values))
    wanted, found = oracle(*inputs(name)).asnumpy(), net(*inputs(name)).asnumpy()
    if name == "encoder":
        ms.set_context(mode=ms.GRAPH_MODE)
        try:
            np.testing.assert_allclose(net(*inputs(name)).asnumpy(), found, atol=1e-5)  # the same float32 sums
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
    if name == "forms":  # a head without weights still attends evenly: its weights are in the mean that was returned
        wanted, found = wanted - wanted.mean(1, keepdims=True), found - found.mean(1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=3e-5)  # float32, sums of 48 products of size one


def test_a_plan_replays_and_training_goes_on(tmp_path):
    net = zoo_ms.randomise(Encoder())
    desc = slimkit_ms.PruneMindSpore(net, inputs("encoder")).set_alignment(4).prune(0.5)
    slimkit_ms.save_pruned(str(tmp_path / "small"), net, desc)
    fresh = slimkit_ms.load_pruned(str(tmp_path / "small"), Encoder())
    x = inputs("encoder")[0]
    for cell in (net, fresh):
        cell.set_train(False)
    np.testing.assert_array_equal(fresh(x).asnumpy(), net(x).asnumpy())
    twin = copy.deepcopy(fresh)
    np.testing.assert_array_equal(twin(x).asnumpy(), net(x).asnumpy())
    loss = nn.TrainOneStepCell(nn.WithLossCell(fresh, nn.MSELoss()), nn.Adam(fresh.trainable_params(), 1e-2))
    losses = [float(loss(x, ops.ones((2, 5))).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_pruned_attention_is_made_sparse_and_takes_deltas():
    """The size of its heads no longer follows from its width; every room reads it from the weights."""
    net, x = zoo_ms.randomise(Encoder()), inputs("encoder")[0]
    slimkit_ms.PruneMindSpore(net, x).set_alignment(1).prune(0.6, ["into", "*.out_proj", "*.dense2", "head"])
    attention = net.body.layers[0].self_attn
    inner = attention.num_heads * 8
    assert (type(attention), inner < 32) == (PrunedMultiheadAttention, True)
    wanted = net(x).asnumpy()
    report = slimkit_ms.Compressor(net, slimkit_ms.SparseConfig(method="hessian", sparse_ratio=0.5)).compress(
        [x, x + 1]
    )
    parts = {n: layer for n, layer in report["layers"].items() if "layers.0.self_attn" in n}
    assert len(parts) == 4
    weight = attention.in_proj_weight.asnumpy()
    assert {float((weight[i * inner : (i + 1) * inner] == 0).mean()) for i in range(3)} == {0.5}
    sparse = net(x).asnumpy()
    zeros = slimkit_ms.freeze_zeros(net)
    np.testing.assert_allclose(net(x).asnumpy(), sparse, atol=1e-5)  # the same float32 sums
    optimizer = nn.SGD(net.trainable_params(), 0.1)
    nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), optimizer)(x, ops.ones((2, 5)))
    assert (attention.in_proj_weight.asnumpy()[weight == 0] == 0).all()
    assert not np.array_equal(attention.in_proj_weight.asnumpy(), weight)
    zeros.remove()
    assert type(attention) is PrunedMultiheadAttention
    slimkit_ms.apply_delta(net, "prefix", prefix_token_num=3, inputs=x)
    assert net(x).shape == wanted.shape


def test_what_the_compiler_refuses_is_no_news_to_standard_error(capfd):
    model, x = zoo_ms.build("vit")  # its first plan contradicts the code
    slimkit_ms.PruneMindSpore(model, x).set_alignment(1).analysis(0.7, [-1])
    assert "Call Stack" not in capfd.readouterr().err
