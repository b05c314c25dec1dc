"""One small attention model in both frameworks, with the same names and, given the same arrays, the same outputs."""

from __future__ import annotations

import numpy as np

WIDTH, HEADS, VOCABULARY, PLACES = 16, 2, 30, 16


def torch_model():
    """Attention by scaled_dot_product_attention, with a padding mask and learned positions."""
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask):
            q, k, v = (f(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            return self.out(y.transpose(1, 2).flatten(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(PLACES, WIDTH)
            self.layers = nn.ModuleList([Attention(), Attention()])
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, ids, attention_mask):
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            hidden = (1.0 - attention_mask[:, None, None].float()) * -1e4
            for layer in self.layers:
                x = x + layer(x, hidden)
            return self.head(x)

    return Net()


def mindspore_model():
    """The same, written as MindSpore models write it: two products around a softmax."""
    from mindspore import nn, ops

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Dense(WIDTH, WIDTH) for _ in range(3))
            self.out = nn.Dense(WIDTH, WIDTH)
            self.num_heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
            self.product = ops.BatchMatMul(transpose_b=True)

        def split(self, x):
            return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).swapaxes(1, 2)

        def construct(self, x, mask=None):
            q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
            scores = ops.bmm(q, k.swapaxes(2, 3)) * self.scale
            if mask is not None:
                scores = scores + mask
            y = ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2)
            return self.out(y.reshape(x.shape))

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(PLACES, WIDTH)
            self.layers = nn.CellList([Attention(), Attention()])
            self.head = nn.Dense(WIDTH, 4)

        def construct(self, ids, attention_mask):
            x = self.words(ids) + self.places(ops.arange(ids.shape[1]))
            hidden = (1.0 - attention_mask[:, None, None].float()) * -1e4
            for layer in self.layers:
                x = x + layer(x, hidden)
            return self.head(x)

    return Net()


def build(kit, seed: int = 0):
    """The model of a kit, evaluating, its parameters the same in both."""
    net = torch_model() if kit.name == "torch" else mindspore_model()
    rng = np.random.default_rng(seed)
    values = {}
    for name, parameter in kit.params(net).items():
        values[name.replace("embedding_table", "weight")] = (parameter, tuple(parameter.shape))
    for _, (parameter, shape) in sorted(values.items()):
        kit.assign(parameter, (rng.standard_normal(shape) * 0.3).astype(np.float32))
    kit.train_mode(net, False)
    return net


def batch(kit):
    """Ids and a mask that hides the end of one text."""
    rng = np.random.default_rng(1)
    mask = np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    return kit.tensor(rng.integers(0, VOCABULARY, (2, 5))), kit.tensor(mask)
