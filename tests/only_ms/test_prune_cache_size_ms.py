"""The budget "kv_cache" on Cells."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError
from slimkit_ms import PruneMindSpore

import mindspore as ms
from mindspore import nn, ops


class Net(nn.Cell):
    """Two groups of queries share each key and value; an inner layer behind."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.query, self.key, self.value = nn.Dense(16, 32), nn.Dense(16, 16), nn.Dense(16, 16)
        self.out, self.up, self.down = nn.Dense(32, 16), nn.Dense(16, 24), nn.Dense(24, 16)
        self.heads, self.groups = 8, 4

    def construct(self, ids):
        x = self.words(ids)
        b, n, _ = x.shape
        q = self.query(x).reshape(b, n, self.heads, 4).swapaxes(1, 2)
        k, v = (f(x).reshape(b, n, self.groups, 4).swapaxes(1, 2) for f in (self.key, self.value))
        many = self.heads // self.groups
        k = ops.broadcast_to(k[:, :, None], (b, self.groups, many, n, 4)).reshape(b, self.heads, n, 4)
        v = ops.broadcast_to(v[:, :, None], (b, self.groups, many, n, 4)).reshape(b, self.heads, n, 4)
        y = ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(2, 3)), -1), v)
        x = x + self.out(y.swapaxes(1, 2).reshape(b, n, -1))
        return x + self.down(ops.relu(self.up(x)))


def test_half_the_cache_of_a_cell_is_half_its_keys_and_values():
    ids, cell = ms.Tensor(np.arange(8).reshape(1, 8), ms.int32), Net().set_train(False)
    pruner = PruneMindSpore(cell, ids).set_budget("kv_cache").set_alignment(1)
    pruner.set_importance_evaluation_function("l1").prune(0.5, [])
    assert pruner.report()["reached"] == 0.5
    assert (cell.key.weight.shape, cell.value.weight.shape) == ((8, 16), (8, 16))
    assert (cell.query.weight.shape, cell.out.weight.shape) == ((16, 16), (16, 16))
    assert (cell.up.weight.shape, cell.words.embedding_table.shape) == ((24, 16), (20, 16))
    assert cell(ids).shape == (1, 8, 16)


def test_a_cell_without_attention_is_refused_and_stays():
    cell = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
    with pytest.raises(ArgumentError, match="attention"):
        PruneMindSpore(cell, ms.Tensor(np.ones((1, 8), np.float32))).set_budget("kv_cache").prune(0.5)
    assert cell[0].weight.shape == (16, 8)
