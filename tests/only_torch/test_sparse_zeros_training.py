"""Zeros stay through real training of more than one layer, shared ones too."""

from __future__ import annotations

from slimkit import freeze_zeros

import torch
from torch import nn


def half_zero(model):
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.view(-1)[::2] = 0
    return model


def test_freeze_zeros_leaves_backward_through_several_layers_alone():
    torch.manual_seed(0)
    model = half_zero(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with freeze_zeros(model):
        for _ in range(3):
            model(torch.randn(4, 1, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for old, new in zip(before, model.parameters()):
        if new.ndim > 1:
            assert torch.equal(old == 0, new == 0)
            assert not torch.equal(old, new)


def test_a_layer_used_twice_in_one_forward_trains():
    torch.manual_seed(0)
    layer = half_zero(nn.Linear(4, 4))
    with freeze_zeros(layer):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer(layer(torch.randn(3, 4))).square().mean().backward()
        optimizer.step()
    assert bool((layer.weight.view(-1)[::2] == 0).all())


def test_weights_changed_by_hand_are_zero_again_at_the_next_forward():
    layer = half_zero(nn.Linear(4, 4))
    handle = freeze_zeros(layer)
    layer.weight.data.fill_(1.0)
    layer(torch.randn(1, 4))
    assert bool((layer.weight.view(-1)[::2] == 0).all())
    handle.remove()
    layer.weight.data.fill_(1.0)
    layer(torch.randn(1, 4))
    assert bool((layer.weight == 1).all())
