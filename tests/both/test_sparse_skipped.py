"""What has a matrix and stays whole is named with its reason, in both frameworks; adapters keep theirs."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig


def many(kit):
    """One layer that can be sparse among many that cannot."""
    nn = kit.torch.nn if kit.name == "torch" else kit.ms.nn

    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.table, self.norm = kit.linear(8, 8), kit.embedding(5, 8), kit.layer_norm(8)
            self.line = nn.Conv1d(4, 8, 3)
            self.turned = nn.ConvTranspose2d(4, 1, 1) if kit.name == "torch" else nn.Conv2dTranspose(4, 1, 1)
            self.lstm, self.cell = nn.LSTM(8, 8), nn.GRUCell(8, 8)
            make = kit.torch.nn.Parameter if kit.name == "torch" else kit.ms.Parameter
            self.own = make(kit.tensor(np.ones((8, 8), np.float32)))
            self.positions = make(kit.tensor(np.ones((1, 5, 8), np.float32)))

        def forward(self, x):
            return self.fc(x)

        construct = forward

    return Net()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_other_layers_and_matrices_are_named(kit, method):
    data = [kit.tensor(np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32))]
    report = kit.slim.Compressor(many(kit), SparseConfig(method=method)).compress(data)
    assert list(report["layers"]) == ["fc"]
    assert set(report["skipped"]) == {"line", "turned", "lstm", "cell", "own"}
    assert "LSTM" in report["skipped"]["lstm"]
    assert "itself" in report["skipped"]["own"]


@pytest.mark.parametrize("kind", ["lora", "adapter", "low_rank_adapter"])
def test_deltas_stay_whole_and_their_zeros_free(kit, kind):
    model = kit.fill(kit.named(first=kit.linear(8, 8), act=kit.relu(), last=kit.linear(8, 8)))
    kit.slim.apply_delta(model, kind, targets=["first", "last"])
    before = {n: v for n, v in kit.values(model).items() if "mindpet_delta" in n}
    data = [kit.tensor(np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32))]
    report = kit.slim.Compressor(model, SparseConfig(method="wanda")).compress(data)
    assert list(report["layers"]) == ["first", "last"]
    assert report["zeros"] == 64
    for name, value in before.items():
        np.testing.assert_array_equal(kit.values(model)[name], value)
    with kit.slim.freeze_zeros(model) as frozen:
        assert set(frozen.masks) == {"first", "last"}
