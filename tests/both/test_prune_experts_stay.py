"""Experts of which nothing says how many there are: they stay whole, and the report says so and why."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.prune.experts import WHY_STAY

WIDTH, INNER, EXPERTS = 16, 24, 4


def torch_net(kit):
    torch = kit.torch

    class Moe(torch.nn.Module):
        """Every expert is asked for every token; the share is zero where it was not chosen."""

        def __init__(self):
            super().__init__()
            self.n_experts = EXPERTS
            self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
            self.up = torch.nn.Parameter(torch.zeros(EXPERTS, WIDTH, INNER))
            self.down = torch.nn.Parameter(torch.zeros(EXPERTS, INNER, WIDTH))

        def forward(self, x):
            logits = self.gate(x)
            best = logits.topk(2).values
            shares = torch.where(logits >= best[:, -1:], logits, -1e9).softmax(-1)
            return (torch.relu(x @ self.up) @ self.down * shares.T[:, :, None]).sum(0)

    return kit.named(a=torch.nn.Linear(8, WIDTH), moe=Moe(), b=torch.nn.Linear(WIDTH, 32), c=torch.nn.Linear(32, 4))


def mindspore_net(kit):
    ms, ops = kit.ms, kit.ms.ops

    class Moe(ms.nn.Cell):
        """As in torch."""

        def __init__(self):
            super().__init__()
            self.n_experts = EXPERTS
            self.gate = ms.nn.Dense(WIDTH, EXPERTS, has_bias=False)
            self.up = ms.Parameter(ms.Tensor(np.zeros((EXPERTS, WIDTH, INNER), np.float32)), name="up")
            self.down = ms.Parameter(ms.Tensor(np.zeros((EXPERTS, INNER, WIDTH), np.float32)), name="down")

        def construct(self, x):
            logits = self.gate(x)
            best, _ = ops.topk(logits, 2)
            shares = ops.softmax(ops.where(logits >= best[:, -1:], logits, -1e9), -1)
            return (ops.matmul(ops.relu(ops.matmul(x, self.up)), self.down) * shares.T[:, :, None]).sum(0)

    return kit.named(a=ms.nn.Dense(8, WIDTH), moe=Moe(), b=ms.nn.Dense(WIDTH, 32), c=ms.nn.Dense(32, 4))


@pytest.mark.parametrize("importance", ["l1", "output"])
def test_experts_that_no_configuration_counts_stay_and_the_report_says_why(kit, importance):
    net = kit.fill((torch_net if kit.name == "torch" else mindspore_net)(kit))
    before = sum(int(np.prod(tuple(p.shape))) for p in kit.params(net).values())
    x = kit.tensor(np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32))
    job = kit.room("prune").Pruner(net, x).set_alignment(4).set_compensation(None)
    job.set_importance_evaluation_function(importance, calibration=[x]).prune(0.9, [])
    assert f"the experts of moe stay whole: {WHY_STAY[kit.name]}" in job.report()["notes"]
    shapes = {name: tuple(p.shape) for name, p in kit.params(net).items()}
    assert shapes["moe.gate.weight"][0] == shapes["moe.up"][0] == shapes["moe.down"][0] == EXPERTS
    assert sum(int(np.prod(shape)) for shape in shapes.values()) < 0.92 * before
