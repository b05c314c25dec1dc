"""A stack of blocks for tests of walks over files: the graph compiler wants cells in files."""

import numpy as np

import mindspore as ms
from mindspore import nn, ops


class Stem(nn.Cell):
    """Token embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)

    def construct(self, ids):
        return self.embed(ids)


class Block(nn.Cell):
    """A norm, two dense layers that share their input, a third, and the residual stream."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((16,))
        self.gate, self.up, self.down = nn.Dense(16, 24), nn.Dense(16, 24), nn.Dense(24, 16)

    def construct(self, x):
        y = self.norm(x)
        return x + self.down(ops.relu(self.gate(y)) * self.up(y))


class Stack(nn.Cell):
    """The whole, or what is not its head."""

    def __init__(self, n_blocks=3, head=True):
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.CellList([Block() for _ in range(n_blocks)])
        self.head = nn.Dense(16, 20) if head else nn.Identity()

    def construct(self, ids):
        x = self.stem(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def built(path):
    """One part of the stack."""
    return Stem() if path == "" else Block()


def filled(cell, seed=0):
    """The cell with values of its own."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():
        p.set_data(ms.Tensor(rng.standard_normal(p.shape).astype(np.float32) * 0.3))
    return cell
