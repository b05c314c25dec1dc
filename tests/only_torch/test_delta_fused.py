"""The steps of autograd that stand for the plain calls of LoRA and DoRA: the same outputs, the same derivatives."""

import pytest

import slimkit
from slimkit.delta import fused, lora_layers

import torch
from torch import nn


def derivatives(net, x):
    """The output, its gradients and the gradients of those, for the input and everything that trains."""
    leaves = [x, *net.parameters()]
    y = net(x)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return y, first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize("tokens", [2, 600])  # the sum of weight and delta pays over many tokens, and is taken there
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_one_step_is_the_plain_calls(dora, bias, tokens, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16, bias=bias)).double()
    slimkit.apply_delta(net, "lora", ["0"], rank=4, dora=dora, freeze=False)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(3, tokens, 24, dtype=torch.double, requires_grad=True)
    got = derivatives(net, x)
    used = "_DoraLinear" if dora else "_LoraSummed" if tokens == 600 else "_LoraLinear"
    assert type(got[0].grad_fn).__name__ == f"{used}Backward"
    once = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])  # no second derivative is asked for
    for module in (fused, lora_layers):
        monkeypatch.setattr(module, "fuses", lambda *_: False)
    want = derivatives(net, x)
    assert "Backward" in type(want[0].grad_fn).__name__
    assert type(want[0].grad_fn).__name__ != type(got[0].grad_fn).__name__
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)  # float64
    torch.testing.assert_close(once, want[1], rtol=1e-9, atol=1e-9)


def test_halves_keep_their_side_branch():
    """A delta far below the weight's own rounding still counts: it is added to the outputs, not to the weight."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    nn.init.ones_(net[0].weight)
    slimkit.apply_delta(net, "lora", ["0"], rank=1, alpha=1, dtype=torch.bfloat16)
    layer = net[0]
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]] * 64).to(torch.bfloat16)  # the base gives zero
    with torch.no_grad():
        layer.mindpet_delta_lora_a.zero_()[0, 0] = 1
        layer.mindpet_delta_lora_b.fill_(2.0**-12)
    assert torch.equal(net(x).float(), torch.full((64, 8), 2.0**-12))


def test_a_magnitude_of_zero_can_still_learn():
    net = nn.Sequential(nn.Linear(6, 4))
    slimkit.apply_delta(net, "lora", ["0"], rank=2, dora=True)
    magnitude = net[0].mindpet_delta_lora_magnitude
    with torch.no_grad():
        magnitude[1] = 0
    net(torch.ones(5, 6)).square().sum().backward()
    assert bool(torch.isfinite(magnitude.grad).all())
    assert float(magnitude.grad[1].abs()) > 0
