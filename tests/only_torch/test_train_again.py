"""Training again with the optimizer of an earlier training, which a scheduler has put its hands on."""

import pytest

from slimkit import Trainer, linear_schedule

import torch
from torch import nn

BATCHES = [(torch.ones(4, 3), torch.ones(4, 1))] * 3


@pytest.mark.parametrize("schedule", [None, linear_schedule(1)], ids=["constant", "scheduled"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("same", [True, False], ids=["same trainer", "another trainer"])
def test_an_optimizer_serves_twice(kind, schedule, same):
    model = nn.Linear(3, 1)
    optimizer = kind(model.parameters(), lr=0.1)
    first = Trainer(model, nn.functional.mse_loss, optimizer)
    losses = first.train(BATCHES, 1, create_scheduler_fn=schedule).get_metric_values("train_loss_step")
    before = model.weight.detach().clone()
    again = first if same else Trainer(model, nn.functional.mse_loss, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    later = again.train(BATCHES, 1).get_metric_values("train_loss_step")
    assert len(later) == len(losses) == 3
    assert not torch.equal(model.weight, before)
