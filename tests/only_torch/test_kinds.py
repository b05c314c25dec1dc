"""What kind of layer a module is: one table, and every room that asks it says the same."""

from __future__ import annotations

import pytest

from slimkit import bridge, kinds
from slimkit.delta.framework import kind_of as delta_kind
from slimkit.sparse.slots import kind_of as sparse_kind

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Sub(nn.Conv2d):
    pass


def wrapper():
    """A common name for something else."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

    return Conv1D()


# module -> the family's word, is it a layer, weight pruning's word, sparsity's word, delta's word
CASES = [
    (nn.Linear(4, 3), "linear", True, "linear", "linear", "linear"),
    (OwnForward(4, 3), "linear", True, "linear", "linear", ""),
    (Conv1D(3, 4), "linear", True, "linear_t", "conv1d", "conv1d"),
    (wrapper(), None, False, "other", None, ""),
    (nn.Conv2d(4, 4, 3), "conv", True, "conv", "conv2d", "conv2d"),
    (Sub(4, 4, 3), "conv", True, "conv", "conv2d", "conv2d"),
    (nn.Conv1d(4, 4, 3), "conv", True, "conv", None, ""),
    (nn.ConvTranspose2d(4, 4, 3), "conv", True, "other", None, ""),
    (nn.Embedding(4, 4), "embedding", False, "embedding", None, "embedding"),
    (nn.BatchNorm2d(4), "norm", False, "norm", None, ""),
    (nn.InstanceNorm1d(4, affine=True), "norm", False, "norm", None, ""),
    (nn.RMSNorm(4), "norm", False, "norm", None, ""),
    (nn.ReLU(), None, False, "other", None, ""),
]


@pytest.mark.parametrize(("module", "word", "layer", "cutting", "sparsity", "delta"), CASES)
def test_every_room_reads_the_one_table(module, word, layer, cutting, sparsity, delta):
    kind = kinds.kind_of(module)
    assert (kind and kind.word) == word
    assert kinds.is_layer(module) == layer
    assert bridge._kind(module) == cutting
    assert sparse_kind(module) == sparsity
    assert delta_kind(module) == delta


def test_a_parametrised_layer_stays_what_it_is():
    layer = torch.nn.utils.parametrizations.weight_norm(Conv1D(3, 4))
    assert kinds.is_in_out(layer)
    assert kinds.is_layer(layer)
