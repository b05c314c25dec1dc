"""Train, prune, train in MindSpore: steps that were compiled or held before the cut go on, hooks and moments too."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit_ms import PruneMindSpore, migrate_optimizer

import mindspore as ms
from mindspore import nn, ops

X = ms.Tensor(np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))


def network():
    net = nn.SequentialCell(nn.Dense(8, 32), nn.ReLU(), nn.Dense(32, 32), nn.ReLU(), nn.Dense(32, 4))
    chance = np.random.default_rng(1)
    for p in net.get_parameters():
        p.set_data(ms.Tensor(chance.standard_normal(p.shape).astype(np.float32) * 0.3))
    return net


class Loss(nn.Cell):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def construct(self, x):
        return ops.mean(ops.square(self.net(x)))


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_steps_from_before_the_cut_go_on(mode):
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    try:
        net = network()
        adam = nn.Adam(net.trainable_params(), 0.01)
        step = nn.TrainOneStepCell(Loss(net), adam)
        step.set_train()
        held = [step(X) for _ in range(2)]
        seen = []
        if mode == ms.PYNATIVE_MODE:
            net[2].weight.register_hook(lambda g: seen.append(g.shape))
        desc = PruneMindSpore(net, X).set_alignment(4).prune(0.6, [-1])
        assert net[2].weight.shape != (32, 32)
        with pytest.raises((RuntimeError, ValueError)):  # moments of the old shapes are told, not written past
            step(X).asnumpy()
            ms.runtime.synchronize()
        migrate_optimizer(adam, net, desc)
        values = net[2].weight.asnumpy().copy()
        losses = [float(step(X)) for _ in range(3)]
        assert losses[-1] < losses[0] < float(held[0])
        assert not np.array_equal(values, net[2].weight.asnumpy())
        # A fresh step on the same cell sees the same loss: nothing old is computed.
        np.testing.assert_allclose(float(Loss(net)(X)), float(step(X)), rtol=1e-6)
        if mode == ms.PYNATIVE_MODE:
            assert set(seen) == {net[2].weight.shape}
    finally:
        ms.set_context(mode=before)


def test_optimizers_with_groups_and_several_states_go_on():
    net = network()
    biases = [p for p in net.trainable_params() if "bias" in p.name]
    weights = [p for p in net.trainable_params() if "bias" not in p.name]
    groups = [{"params": biases, "lr": 0.1}, {"params": weights}, {"order_params": net.trainable_params()}]
    optimizers = [nn.Momentum(groups, 0.01, 0.9), nn.RMSProp(net.trainable_params(), 0.01, centered=True)]
    shapes = [p.shape for p in net.trainable_params()]
    for optimizer in optimizers:
        optimizer(tuple(ops.ones(s) for s in shapes))
    desc = PruneMindSpore(net, X).set_alignment(4).prune(0.6, [-1])
    now = [p.shape for p in net.trainable_params()]
    assert now != shapes
    for optimizer in optimizers:
        report = migrate_optimizer(optimizer, net, desc)
        assert report.cut
        optimizer(tuple(ops.ones(s) for s in now))
        ms.runtime.synchronize()
