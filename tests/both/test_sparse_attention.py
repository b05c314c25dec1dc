"""Attention that reads its weights itself: calibrated on its query, key and value, and its zeros kept in training."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.sparse import SparseConfig


def attention(kit, **kw):
    cells = kit.torch.nn if kit.name == "torch" else kit.ms.nn
    return kit.fill(cells.MultiheadAttention(16, 2, batch_first=True, **kw))


def batches(kit, inputs, n=3):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        q, k, v = (kit.tensor((rng.standard_normal((4, 12, 16)) * rng.random(16)).astype(np.float32)) for _ in range(3))
        found.append({"one": (q, q, q), "two": (q, k, k), "three": (q, k, v)}[inputs])
    return found


@pytest.mark.parametrize("inputs", ["one", "two", "three"])
@pytest.mark.parametrize("method", ["hessian", "par"])
def test_same_masks_and_values_in_every_kit(method, inputs):
    from tests import kits
    from tests.conftest import INSTALLED

    found = {}
    for name in INSTALLED:
        kit = kits.make(name)
        model = attention(kit)
        report = kit.slim.Compressor(model, SparseConfig(method=method)).compress(batches(kit, inputs))
        rows = {layer: row["rows"] for layer, row in report["layers"].items()}
        assert rows == {
            "in_proj_weight[query]": 144,
            "in_proj_weight[key]": 144,
            "in_proj_weight[value]": 144,
            "out_proj": 144,
        }
        assert report["fallbacks"] == report["skipped"] == {}
        found[name] = kit.values(model)
    first, *others = found.values()
    for other in others:
        for name, a in first.items():
            assert ((a == 0) == (other[name] == 0)).all()
            np.testing.assert_allclose(a, other[name], atol=1e-4)  # float32 of two libraries


@pytest.mark.parametrize(("widths", "key"), [({}, "in_proj_weight[key]"), ({"kdim": 8, "vdim": 8}, "k_proj_weight")])
def test_magnitude_takes_each_part_by_itself(kit, widths, key):
    model = attention(kit, **widths)
    compressor = kit.slim.Compressor(model, SparseConfig(pattern="2:4", ignore=[key]))
    report = compressor.compress()
    assert len(report["layers"]) == 3
    assert report["ignored"] == [key]
    for name, mask in compressor.masks.items():
        mask = np.asarray(mask)
        assert (mask.reshape(mask.shape[0], -1, 4).sum(2) == 2).all(), name


@pytest.mark.parametrize("graph", [False, True])
def test_zeros_of_attention_stay_in_training(kit, graph):
    model = kit.named(attend=Attend(kit), last=kit.fill(kit.linear(16, 4)))
    compressor = kit.slim.Compressor(model, SparseConfig(ignore=["*[key]"]))
    compressor.compress()
    before = kit.values(model)
    x, y = (kit.tensor(np.random.default_rng(1).standard_normal(s).astype(np.float32)) for s in ((3, 5, 16), (3, 5, 4)))
    plain = kit.array(model(x))
    with in_mode(kit, graph):
        zeros = kit.slim.freeze_zeros(model, compressor.masks)
        assert set(zeros.masks) == set(compressor.masks)
        np.testing.assert_allclose(kit.array(model(x)), plain, atol=1e-5)  # the mask changes nothing that is sparse
        step(kit, model, x, y)
        after = kit.values(model)
        zeros.remove()
    assert after.keys() == before.keys() == kit.values(model).keys()
    for name, old in before.items():
        assert (after[name] != old).any(), name
        if old.ndim == 2:
            rows = slice(16, 32) if name.endswith("in_proj_weight") else slice(0, 0)  # the keys' were left alone
            assert np.delete((after[name] == 0) == (old == 0), np.r_[rows], 0).all(), name
    with in_mode(kit, graph):
        step(kit, model, x, y)
    name = next(n for n in before if n.endswith("in_proj_weight"))
    assert (kit.values(model)[name] == 0).mean() < 0.1  # let go, they move again


def Attend(kit):
    """Attention on one input, as a layer of a chain."""
    inner = attention(kit)

    class SelfAttention(kit.Module):
        def __init__(self):
            super().__init__()
            self.attn = inner

        def forward(self, x):
            return self.attn(x, x, x)[0]

        def construct(self, x):
            return self.attn(x, x, x)[0]

    return SelfAttention()


def in_mode(kit, graph):
    import contextlib

    if kit.name == "torch":
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def mode():
        before = kit.ms.get_context("mode")
        kit.ms.set_context(mode=kit.ms.GRAPH_MODE if graph else kit.ms.PYNATIVE_MODE)
        try:
            yield
        finally:
            kit.ms.set_context(mode=before)

    return mode()


def step(kit, model, x, y):
    """Two steps of Adam with weight decay."""
    if kit.name == "torch":
        optimizer = kit.torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        return
    nn = kit.ms.nn
    optimizer = nn.AdamWeightDecay(model.trainable_params(), 0.05, weight_decay=0.1)
    train = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), optimizer)
    train.set_train()
    for _ in range(2):
        train(x, y)
    model.set_train(False)
