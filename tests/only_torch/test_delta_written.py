"""Prefixes on attention that is written out, two matrix products around a softmax, in the ways people write it."""

import copy
import math

import pytest

import slimkit
from slimkit.core.errors import UnsupportedError
from tests import attention_twins as twins
from tests import kits

import torch
from torch import nn
from torch.nn import functional as F


class Parts(nn.Module):
    """The twins' attention layer without its forward."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(twins.WIDTH, twins.WIDTH) for _ in range(4))
        self.num_heads, self.drop = twins.HEADS, nn.Dropout(0.0)

    def split(self, x):
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class Matmul(Parts):
    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        weights = self.drop(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype))
        return self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class Operators(Parts):
    def attend(self, q, k, v, mask):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores.masked_fill(mask < -1, float("-inf"))
        return scores.softmax(dim=-1) @ v

    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Batched(Parts):
    def forward(self, x, mask):
        q, k, v = (self.split(f(x)).flatten(0, 1) for f in (self.query, self.key, self.value))
        scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
        scores += mask.expand(-1, self.num_heads, x.shape[1], -1).flatten(0, 1)
        mixed = torch.bmm(torch.softmax(scores, -1), v).view(x.shape[0], self.num_heads, x.shape[1], -1)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Flagged(Parts):
    """Both ways in one method, as small GPTs have it."""

    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.training:
            y = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Summed(Parts):
    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def batch():
    return twins.batch(kits.make("torch"))


def written(kind):
    net = twins.build(kits.make("torch"))
    for i, layer in enumerate(net.layers):
        made = kind()
        made.load_state_dict(layer.state_dict())
        net.layers[i] = made.eval()
    return net


@pytest.mark.parametrize("kind", [Matmul, Operators, Batched, Flagged])
def test_it_computes_what_the_fused_call_computes(kind, batch, tmp_path):
    fused, net = twins.build(kits.make("torch")), written(kind)
    y0 = net(*batch).detach()
    torch.testing.assert_close(y0, fused(*batch).detach())
    for seed, model in ((0, fused), (0, net)):
        torch.manual_seed(seed)
        slimkit.apply_delta(model, "prefix", prefix_token_num=3, inputs=batch)
    want = fused(*batch).detach()
    torch.testing.assert_close(net(*batch).detach(), want, rtol=1e-5, atol=1e-5)  # the same numbers in another order
    twin = copy.deepcopy(net)
    net(*batch).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)
    slimkit.save_delta(net, tmp_path / "d")
    fresh = written(kind)
    slimkit.load_delta(fresh, tmp_path / "d")  # nothing has to run
    assert torch.equal(fresh(*batch), twin(*batch))
    slimkit.remove_delta(net)
    assert torch.equal(net(*batch), y0)
    assert type(net.layers[0]) is kind
    assert vars(net.layers[0]).keys() == vars(written(kind).layers[0]).keys()


def test_both_ways_of_a_flagged_method_see_the_prefix(batch):
    net = written(Flagged)
    slimkit.apply_delta(net, "prefix", prefix_token_num=3, inputs=batch)
    torch.testing.assert_close(net.train()(*batch), net.eval()(*batch), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_extended_says_why_and_stays(batch):
    net = written(Summed)
    y0 = net(*batch)
    with pytest.raises(UnsupportedError, match=r"layers\.0: 0 matrix products"):
        slimkit.apply_delta(net, "prefix", inputs=batch)
    assert torch.equal(net(*batch), y0)
    assert type(net.layers[0]) is Summed


def test_it_compiles(batch):
    net = written(Matmul)
    slimkit.apply_delta(net, "prefix", prefix_token_num=3, inputs=batch)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch), net(*batch))
