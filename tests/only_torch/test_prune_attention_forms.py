"""Attention as people write it: softmax by hand, heads under short names or in numbers, noise in training."""

import pytest

from slimkit import PruneTorch, check_pruning

import torch
from torch import nn
from torch.nn import functional as F


class Scores(nn.Module):
    """Learned queries meet keys; the scale comes from the width that the code sees."""

    def __init__(self, form):
        super().__init__()
        self.form, self.h = form, 4
        self.latents = nn.Parameter(torch.randn(1, 7, 64))
        self.i, self.o = nn.Linear(24, 64), nn.Linear(64, 6)
        self.q, self.k, self.v, self.p = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        y, rows = self.i(x), x.shape[0]
        made = (self.q(self.latents.expand(rows, -1, -1)), self.k(y), self.v(y))
        q, k, v = (t.view(rows, -1, self.h, t.shape[-1] // self.h).transpose(1, 2) for t in made)
        a = q @ k.mT * q.shape[-1] ** -0.5
        if self.form == "sigmoid":
            a = a.sigmoid()
        elif self.form == "exp":
            a = a.exp() / a.exp().sum(-1, keepdim=True)
        elif self.form == "square":
            a = F.relu(a) ** 2
        elif self.form == "logsumexp":
            a = (a - a.logsumexp(-1, keepdim=True)).exp()
        return self.o(self.p((a @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("form", ["sigmoid", "exp", "square", "logsumexp", "nothing"])
def test_the_size_of_a_head_stays_where_no_softmax_is_seen(form):
    torch.manual_seed(0)
    net, x = Scores(form).double().eval(), torch.randn(2, 9, 24, dtype=torch.float64)
    left, desc = PruneTorch(net, x).set_alignment(8).analysis(0.5, [])
    assert left < 0.6 * sum(p.numel() for p in net.parameters())
    assert check_pruning(net, x, desc, tolerance=1e-10).holds
    PruneTorch(net, x).prune_by_desc(desc)
    assert net.q.out_features == 16 * net.h < 64


class Numbered(nn.Module):
    """Heads written as numbers, or under a name of one letter; width and heads of one size."""

    def __init__(self, numbers, residual):
        super().__init__()
        self.numbers, self.residual, self.h = numbers, residual, 4
        self.i, self.o = nn.Linear(24, 64), nn.Linear(64, 6)
        self.q, self.k, self.v, self.p = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        y = self.i(x)
        rows, length, _ = y.shape
        heads = 4 if self.numbers else self.h
        q, k, v = (m(y).view(rows, length, heads, 16).transpose(1, 2) for m in (self.q, self.k, self.v))
        z = self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, heads * 16))
        return self.o(y + z if self.residual else z)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_number_in_the_code_keeps_heads_whole_and_nothing_else(numbers, residual):
    torch.manual_seed(0)
    net, x = Numbered(numbers, residual).double().eval(), torch.randn(2, 9, 24, dtype=torch.float64)
    left, desc = PruneTorch(net, x).set_alignment(8).analysis(0.5, [])
    assert abs(left / sum(p.numel() for p in net.parameters()) - 0.5) < 0.02
    assert check_pruning(net, x, desc, tolerance=1e-10).holds
    PruneTorch(net, x).prune_by_desc(desc)
    assert (net.q.out_features == 64) == numbers
    assert net.i.out_features < 64
    assert net.h == (4 if numbers else net.q.out_features // 16)


class Noisy(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.o = kind, nn.Linear(8, 48), nn.Linear(48, 48), nn.Linear(48, 4)

    def forward(self, x):
        y = F.relu(self.a(x))
        if self.training and self.kind == "like":
            y = y + torch.randn_like(y) * torch.rand_like(y)
        elif self.training:
            y = y + getattr(torch.empty_like(y), self.kind)()
        return self.o(F.relu(self.b(y)))


@pytest.mark.parametrize("kind", ["like", "normal_", "uniform_", "exponential_"])
def test_noise_in_training_keeps_nothing_whole(kind):
    net, x = Noisy(kind).eval(), torch.randn(3, 8)
    pruner = PruneTorch(net, x).set_alignment(8)
    pruner.prune(0.5, [-1])
    assert not pruner.report()["without_rule"]
    assert net.a.out_features < 48
    net.train()(x).sum().backward()


class Folded(nn.Module):
    """Attention that reads its width from the input, as ViTs are published."""

    def __init__(self, width, heads, form):
        super().__init__()
        self.form, self.num_heads, self.scale = form, heads, (width // heads) ** -0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        rows, length, width = x.shape
        h, made = self.num_heads, self.qkv(self.norm(x))
        if self.form == "parts first":
            q, k, v = made.reshape(rows, length, 3, h, width // h).permute(2, 0, 3, 1, 4)
        elif self.form == "heads first":
            q, k, v = made.reshape(rows, length, h, 3, width // h).permute(3, 0, 2, 1, 4)
        elif self.form == "chunk":
            q, k, v = (t.reshape(rows, length, h, -1).transpose(1, 2) for t in made.chunk(3, -1))
        else:
            q, k, v = (t.reshape(rows, length, h, width // h).transpose(1, 2) for t in made.split(width, -1))
        y = ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + self.proj(y)
        return x + self.mlp(x)


@pytest.mark.parametrize(("width", "heads"), [(64, 8), (96, 4), (96, 6)])
@pytest.mark.parametrize("form", ["parts first", "heads first", "chunk", "split"])
def test_a_width_read_from_the_input_is_tied_to_its_heads(form, width, heads):
    torch.manual_seed(0)
    blocks = [Folded(width, heads, form) for _ in range(2)]
    net = nn.Sequential(nn.Linear(12, width), *blocks, nn.Linear(width, 5)).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    left, desc = PruneTorch(net, x).set_alignment(8).analysis(0.5, [-1])
    assert abs(left / sum(p.numel() for p in net.parameters()) - 0.5) < 0.02
    assert check_pruning(net, x, desc, tolerance=1e-10).holds
