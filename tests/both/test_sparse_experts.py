"""Experts that a model keeps in one parameter with three axes, in both frameworks, with NumPy as the referee."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig, reconstruct
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import Moments
from slimkit.core.sparse.maths.solve import solve

N_EXPERTS, N_IN, N_OUT = 3, 8, 6


def model_of(kit, way, transposed):
    """A router and its experts: each asked for the tokens that chose it, or all at once with zeros for the others."""
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((N_EXPERTS, N_IN)).astype(np.float32)
    w = rng.standard_normal((N_EXPERTS, N_IN, N_OUT) if transposed else (N_EXPERTS, N_OUT, N_IN)).astype(np.float32)
    net = (torch_experts if kit.name == "torch" else mindspore_experts)(kit, way, transposed)
    kit.assign(kit.params(net)["gate.weight"], gate)
    kit.assign(kit.params(net)["w"], w)
    return net, gate, w


def torch_experts(kit, way, transposed):
    torch = kit.torch

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.n_experts = torch.nn.Linear(N_IN, N_EXPERTS, bias=False), N_EXPERTS
            self.w = torch.nn.Parameter(torch.zeros(N_EXPERTS, *((N_IN, N_OUT) if transposed else (N_OUT, N_IN))))

        def forward(self, x):
            choice = self.gate(x).argmax(1)
            if way == "loop":
                experts = {i: self.w[i] if transposed else self.w[i].T for i in choice.unique().tolist()}
                return torch.cat([x[choice == i] @ w for i, w in experts.items()])
            weight = torch.nn.functional.one_hot(choice, N_EXPERTS).to(x.dtype)
            return torch.bmm(weight.T[:, :, None] * x, self.w if transposed else self.w.mT).sum(0)

    return Experts()


def mindspore_experts(kit, way, transposed):
    ms, ops = kit.ms, kit.ms.ops

    class Experts(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.gate, self.n_experts = ms.nn.Dense(N_IN, N_EXPERTS, has_bias=False), N_EXPERTS
            shape = (N_EXPERTS, *((N_IN, N_OUT) if transposed else (N_OUT, N_IN)))
            self.w = ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name="w")
            self.product = ops.BatchMatMul(transpose_b=not transposed)

        def construct(self, x):
            choice = self.gate(x).argmax(1)
            if way == "loop":
                called = sorted(set(choice.asnumpy().tolist()))
                experts = {i: self.w[i] if transposed else self.w[i].T for i in called}
                return ops.cat([ops.matmul(x[choice == i], w) for i, w in experts.items()])
            weight = ops.one_hot(choice, N_EXPERTS, ms.Tensor(1.0), ms.Tensor(0.0))
            spread = weight.T[:, :, None] * x
            return self.product(spread, self.w).sum(0)

    return Experts()


def batches(n=3, rows=128):
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((rows, N_IN)) * rng.random(N_IN)).astype(np.float32) for _ in range(n)]


def expected(config, gate, w, data, transposed):
    """What the core makes of each expert and of the rows that chose it."""
    x = np.concatenate(data)
    choice = (x @ gate.T).argmax(1)
    for i in range(N_EXPERTS):
        layer = SparseLayer(f"w[{i}]", "conv1d" if transposed else "linear", w[i].shape)
        moments = Moments(layer, config.paired)
        moments.add(x[choice == i], x[choice == i] if config.paired else None)
        yield i, int((choice == i).sum()), solve(layer, w[i], moments, config.sparse_ratio, config)


@pytest.mark.parametrize("way", ["loop", "at once"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["hessian", "par"])
def test_each_expert_of_one_parameter_is_fitted_to_its_own_tokens(kit, way, transposed, method):
    model, gate, w = model_of(kit, way, transposed)
    config = SparseConfig(method=method, ignore=["gate"], pattern="2:4")
    compressor = kit.slim.Compressor(model, config)
    report = compressor.compress([kit.tensor(x) for x in batches()])
    assert list(report["layers"]) == [f"w[{i}]" for i in range(N_EXPERTS)]
    assert report["fallbacks"] == report["skipped"] == {}
    found = kit.array(kit.params(model)["w"])
    for i, rows, result in expected(config, gate, w, batches(), transposed):
        assert report["layers"][f"w[{i}]"]["rows"] == rows
        np.testing.assert_allclose(found[i], result.weight, atol=1e-5)  # float64 sums of float32 rows, in any order
        np.testing.assert_array_equal(np.asarray(compressor.masks[f"w[{i}]"]), result.keep)


@pytest.mark.parametrize("way", ["loop", "at once"])
def test_experts_are_trained_together_and_keep_pars_masks(kit, way, monkeypatch):
    monkeypatch.setattr(reconstruct, "LEAST", 10**6)  # the rows that train judge, too: there is something to gain
    monkeypatch.setattr(reconstruct, "HOLD_OUT", 10**6)
    found = {}
    for method in ("par", "block"):
        model, *_ = model_of(kit, way, False)
        config = SparseConfig(method=method, ignore=["gate"], options={"passes": 2} if method == "block" else None)
        report = kit.slim.Compressor(model, config).compress([kit.tensor(x) for x in batches()])
        found[method] = kit.array(kit.params(model)["w"])
    assert ((found["par"] == 0) == (found["block"] == 0)).all()
    rows = report["layers"].values()
    assert all(row["block_error"] < row["block_error_before"] for row in rows)
    assert np.abs(found["par"] - found["block"]).max(axis=(1, 2)).min() > 1e-3  # every expert learned


def test_experts_that_nobody_chose_fall_back_and_are_named(kit):
    model, gate, _ = model_of(kit, "loop", True)
    gate[2] = gate[0] * 1e-3  # never the largest of positive ones
    gate = np.abs(gate)
    kit.assign(kit.params(model)["gate.weight"], gate)
    report = kit.slim.Compressor(model, SparseConfig(method="wanda", targets=["w"])).compress(
        [kit.tensor(np.abs(x)) for x in batches()]
    )
    missed = [n for n, row in report["layers"].items() if row["rows"] < 16]
    assert "w[2]" in missed
    assert list(report["fallbacks"]) == missed
    assert all(report["layers"][n]["method"] == "magnitude" for n in missed)
    assert report["ratio"] == 0.5


def test_a_weight_that_no_product_reads_falls_back_and_is_named(kit):
    model, *_ = model_of(kit, "loop", True)
    forward = "forward" if kit.name == "torch" else "construct"
    setattr(type(model), forward, lambda self, x: self.gate(x).sum() + (self.w * 2).sum())
    report = kit.slim.Compressor(model, SparseConfig(method="hessian", targets=["w"])).compress(
        [kit.tensor(batches()[0])]
    )
    assert list(report["fallbacks"]) == ["w[0]", "w[1]", "w[2]"]
    assert "saw 0 calibration rows" in report["fallbacks"]["w[1]"]


def test_a_parameter_with_three_axes_that_no_word_calls_experts_is_reported(kit):
    class Stack(kit.Module):
        def __init__(self):
            super().__init__()
            self.first = kit.linear(8, 8)
            parameter = kit.torch.nn.Parameter if kit.name == "torch" else kit.ms.Parameter
            self.w = parameter(kit.tensor(np.ones((3, 8, 6), np.float32)))

    report = kit.slim.Compressor(kit.named(stack=Stack()), SparseConfig()).compress()
    assert list(report["layers"]) == ["stack.first"]
    assert "three axes" in report["skipped"]["stack.w"]


def test_a_name_without_brackets_stands_for_all_experts(kit):
    model, *_ = model_of(kit, "at once", False)
    report = kit.slim.Compressor(model, SparseConfig(targets=["w"], ignore=["w[1]"])).compress()
    assert list(report["layers"]) == ["w[0]", "w[2]"]
    assert set(report["ignored"]) == {"gate", "w[1]"}
    assert (kit.array(kit.params(model)["w"])[1] != 0).all()


def test_padding_tokens_do_not_count(kit):
    class Padded(kit.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, hidden, attention_mask):
            return self.net(hidden.reshape(-1, N_IN))

        construct = forward

    mask = np.array([[1] * 40 + [0] * 24] * 2)
    x = batches(1)[0].reshape(2, 64, N_IN)
    found = {}
    for padded in (False, True):
        model, *_ = model_of(kit, "loop", False)
        given = x if padded else x[:, :40]
        batch = {"hidden": kit.tensor(given), "attention_mask": kit.tensor(mask if padded else mask[:, :40])}
        report = kit.slim.Compressor(Padded(model), SparseConfig(method="wanda", min_tokens=1)).compress([batch])
        found[padded] = {n: row["rows"] for n, row in report["layers"].items() if n != "net.gate"}
    assert found[True] == found[False]
    assert sum(found[True].values()) == 80


def test_zeros_in_experts_count_as_made_when_a_report_names_them(kit):
    bridge = kit.room("bridge")
    model, *_ = model_of(kit, "loop", False)
    report = kit.slim.Compressor(model, SparseConfig(method="magnitude", ignore=["gate"])).compress([])
    again, *_ = model_of(kit, "loop", False)
    assert not bridge.has_made_zeros(again)
    bridge.record_zeros_of(again, [*report["layers"], "gone[0]", "gate.gone"])
    assert bridge.has_made_zeros(again)
    assert not bridge.has_made_zeros(again.gate)


def test_an_error_leaves_experts_as_they_were(kit):
    model, *_ = model_of(kit, "loop", False)
    before = kit.array(kit.params(model)["w"])
    bad = batches()[0]
    bad[5, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        kit.slim.Compressor(model, SparseConfig(method="hessian")).compress([kit.tensor(batches()[0]), kit.tensor(bad)])
    np.testing.assert_array_equal(kit.array(kit.params(model)["w"]), before)


def train(kit, model, steps=3):
    x = kit.tensor(batches(1)[0])
    if kit.name == "torch":
        optimizer = kit.torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return
    ms = kit.ms
    optimizer = ms.nn.AdamWeightDecay(model.trainable_params(), 0.05, weight_decay=0.1)
    step = ms.nn.TrainOneStepCell(squared(kit, model), optimizer)
    step.set_train()
    for _ in range(steps):
        step(x)


def squared(kit, model):
    class Squared(kit.ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.net = model

        def construct(self, x):
            return self.net(x).square().mean()

    return Squared()


@pytest.mark.parametrize("compiled", [False, True])
def test_zeros_of_experts_stay_in_training(kit, compiled):
    model, _, before = model_of(kit, "at once", True)
    compressor = kit.slim.Compressor(model, SparseConfig(targets=["w"]))
    compressor.compress()
    kind, dropped = type(model), kit.array(model.w) == 0
    if compiled and kit.name == "mindspore":
        mode = kit.ms.get_context("mode")
        kit.ms.set_context(mode=kit.ms.GRAPH_MODE)
    try:
        with kit.slim.freeze_zeros(model, compressor.masks) as frozen:
            assert list(frozen.masks) == [f"w[{i}]" for i in range(N_EXPERTS)]
            train(kit, model)
            after = kit.array(model.w)
            np.testing.assert_array_equal(after == 0, dropped)
            assert (after[~dropped] != before[~dropped]).all()
        assert type(model) is kind
        train(kit, model)
        assert (kit.array(model.w) == 0).mean() < 0.1  # let go, they move again
    finally:
        if compiled and kit.name == "mindspore":
            kit.ms.set_context(mode=mode)


def gated(kit):
    """Two layers of experts with biases behind one router that sends each token to two of them."""
    base, shapes = kit.Module, {"up": (4, 8, 12), "up_bias": (4, 12), "down": (4, 6, 8), "down_bias": (4, 8)}

    class GatedExperts(base):
        def __init__(self):
            super().__init__()
            self.gate = kit.linear(8, 4, bias=False)
            for name, shape in shapes.items():
                parameter = kit.torch.nn.Parameter if kit.name == "torch" else kit.ms.Parameter
                setattr(self, name, parameter(kit.tensor(np.zeros(shape, np.float32))))

        def forward(self, x):
            scores = kit.array(self.gate(x))
            out = x
            for i in range(4):
                rows = np.nonzero((scores > np.sort(scores, 1)[:, 1:2])[:, i])[0]
                if len(rows):
                    chosen = kit.tensor(rows)
                    hidden = x[chosen] @ self.up[i] + self.up_bias[i]
                    hidden = hidden[:, :6] * hidden[:, 6:]
                    done = hidden @ self.down[i] + self.down_bias[i]
                    place = np.zeros((len(scores), len(rows)), np.float32)
                    place[rows, np.arange(len(rows))] = 1
                    out = out + kit.tensor(place) @ done
            return out

        construct = forward

    return kit.fill(kit.named(**{"0": GatedExperts(), "1": GatedExperts()}))


@pytest.mark.parametrize("method", ["hessian", "par"])
def test_gated_experts_become_the_same_in_every_kit(method):
    from tests import kits
    from tests.conftest import INSTALLED

    found = {}
    for name in INSTALLED:
        kit = kits.make(name)
        model = gated(kit)
        config = SparseConfig(method=method, ignore=["*gate"], min_tokens=4)
        report = kit.slim.Compressor(model, config).compress([kit.tensor(x) for x in batches(2)])
        assert report["fallbacks"] == {}
        rows = {n: row["rows"] for n, row in report["layers"].items()}
        assert len(rows) == 16
        assert sum(n for layer, n in rows.items() if layer.startswith("0.up")) == 2 * 2 * 128
        found[name] = rows, kit.values(model)
    for rows, values in list(found.values())[1:]:
        assert rows == found["torch"][0]
        for name, value in values.items():
            # The same float64 sums of float32 rows; a token that nearly ties may take another way in the second layer.
            np.testing.assert_allclose(value, found["torch"][1][name], atol=1e-4, err_msg=name)
