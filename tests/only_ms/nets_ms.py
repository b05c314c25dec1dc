"""Cells for tests of distillation and training: the graph compiler wants them in files."""

import numpy as np

import mindspore as ms
from mindspore import nn, ops


class Encoder(nn.Cell):
    """Embedding, dense layers and a head; returns (logits, states)."""

    def __init__(self, width, n_layers, seed):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.CellList([nn.Dense(width, width) for _ in range(n_layers)])
        self.head = nn.Dense(width, 7)
        rng = np.random.default_rng(seed)
        for p in self.get_parameters():
            p.set_data(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32) * 0.3))

    def construct(self, ids, mask):
        x = self.embed(ids)
        for layer in self.layers:
            x = ops.tanh(layer(x))
        return self.head(x.mean(1)), x


class Supervised(nn.Cell):
    """A student whose first output is its own loss, as `set_hard_label` reads it."""

    def __init__(self, width, n_layers, seed):
        super().__init__()
        self.net = Encoder(width, n_layers, seed)

    def construct(self, ids, mask):
        logits, states = self.net(ids, mask)
        return ops.square(logits).mean(), logits, states
