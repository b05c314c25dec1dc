"""Sparsity's method "block": par's masks, and blocks trained to give the dense block's outputs, in both frameworks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError
from slimkit.core.sparse import SparseConfig
from slimkit.core.sparse import reconstruct as reconstruction
from slimkit.core.sparse.reconstruct import reconstruct, token_weights
from tests.both.test_sparse_zeros import train

OPTIONS = {"passes": 6, "rate": 0.01}
MANY = 400  # rows of a batch: enough that other rows gain, too


def chain(kit):
    """Three blocks that add to what passes through them."""

    class Block(kit.Module):
        def __init__(self):
            super().__init__()
            self.norm = kit.layer_norm(16)
            self.up, self.act, self.down = kit.linear(16, 24), kit.relu(), kit.linear(24, 16)

        def forward(self, x):
            return x + self.down(self.act(self.up(self.norm(x))))

        construct = forward

    class Chain(kit.Module):
        def __init__(self):
            super().__init__()
            several = kit.torch.nn.ModuleList if kit.name == "torch" else kit.ms.nn.CellList
            self.first = kit.linear(16, 16)
            self.blocks = several([Block() for _ in range(3)])
            self.last = kit.linear(16, 8)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.last(x)

        construct = forward

    return kit.fill(Chain())


def batches(kit, n=6, rows=64, seed=2):
    mix, rng = np.random.default_rng(1).standard_normal((4, 16)), np.random.default_rng(seed)
    draw = [rng.standard_normal((rows, 4)) @ mix + 0.3 * rng.standard_normal((rows, 16)) for _ in range(n)]
    return [kit.tensor(x.astype(np.float32)) for x in draw]


def run(kit, model, data, **kw):
    compressor = kit.slim.Compressor(model, SparseConfig(**{"method": "block", "sparse_ratio": 0.6, **kw}))
    return compressor.compress(data), compressor.masks


def error(kit, model, data, dense):
    return sum(np.square(kit.array(model(x)) - d).sum() for x, d in zip(data, dense)) ** 0.5


@pytest.mark.parametrize("kw", [{}, {"pattern": "2:4", "sparse_ratio": 0.5}])
def test_blocks_come_closer_to_the_dense_ones_and_keep_pars_masks(kit, kw):
    data, other = batches(kit, rows=MANY), batches(kit, rows=MANY, seed=3)
    model, par = chain(kit), chain(kit)
    dense = [kit.array(model(x)) for x in other]
    report, masks = run(kit, model, data, options={"passes": 6}, **kw)
    plain, _ = run(kit, par, data, **{"method": "par", **kw})
    assert error(kit, model, other, dense) < 0.99 * error(kit, par, other, dense)
    assert report["zeros"] == plain["zeros"]
    values = kit.values(model)
    for name, row in report["layers"].items():
        mask = np.asarray(masks[name])
        assert ((values[f"{name}.weight"] != 0) == mask).all()
        assert (mask.size - mask.sum()) == row["zeros"]
        if kw.get("pattern"):
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
        trained = "block_error" in row  # what stands before and behind the blocks is not
        assert trained == name.startswith("blocks.")
        assert not trained or row["block_error"] <= row["block_error_before"]
    rows = [row for row in report["layers"].values() if "block_error" in row]
    assert np.mean([row["block_error"] / row["block_error_before"] for row in rows]) < 1


def test_both_frameworks_learn_the_same():
    from tests import kits
    from tests.conftest import INSTALLED

    found = []
    for name in INSTALLED:
        kit = kits.make(name)
        model = chain(kit)
        report, _ = run(kit, model, batches(kit), options=OPTIONS)
        row = report["layers"]["blocks.1.down"]
        # float32 gradients of two libraries, carried on by Adam, which divides by them
        found.append([row["block_error_before"], row["block_error"]])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0.02)


class TwoLayers:
    """The referee: y = relu(x A^T + a) B^T + b with its gradient by hand, in NumPy."""

    def __init__(self, values, xs, targets):
        self.values = {k: v.astype(np.float32) for k, v in values.items()}
        self.xs, self.targets = xs, targets

    def sizes(self):
        return [len(x) for x in self.xs]

    def start(self):
        return {k: v.copy() for k, v in self.values.items()}

    def free(self):
        matrices = {k: (v != 0).astype(np.float32) for k, v in self.values.items()}
        return {k: m if k.endswith("weight") else np.ones_like(m) for k, m in matrices.items()}

    def target(self, index):
        return self.targets[index], None

    def loss(self, values, index, weights):
        return self.slope(values, index, weights)[0]

    def slope(self, values, index, weights):
        x = self.xs[index]
        inner = x @ values["first.weight"].T + values["first.bias"]
        hidden = np.maximum(inner, 0)
        missing = hidden @ values["last.weight"].T + values["last.bias"] - self.targets[index]
        out = 2 * weights * missing
        back = (out @ values["last.weight"]) * (inner > 0)
        slopes = {"last.weight": out.T @ hidden, "last.bias": out.sum(0)}
        slopes |= {"first.weight": back.T @ x, "first.bias": back.sum(0)}
        return float((weights * missing**2).sum()), {k: slopes[k] for k in values}

    def keep(self, values):
        self.values = dict(values)


def test_two_layers_learn_what_the_referee_learns(kit):
    def net():
        return kit.fill(kit.named(first=kit.linear(16, 12), act=kit.relu(), last=kit.linear(12, 8)))

    data = batches(kit)
    model, start = net(), net()
    dense = [kit.array(model(x)) for x in data]
    run(kit, start, data, method="par")
    report, _ = run(kit, model, data, options=OPTIONS)
    referee = TwoLayers(kit.values(start), [kit.array(x) for x in data], dense)
    one = SimpleNamespace(gather=lambda value: [value], reduce=list, processes=lambda: 1, deals=False)
    facts = reconstruct(one, referee, {"patience": 2, **OPTIONS})
    assert facts["passes"] == report["layers"]["last"]["passes"] > 0
    np.testing.assert_allclose(report["layers"]["first"]["block_error"], facts["block_error"], rtol=1e-3)
    for name, value in kit.values(model).items():
        np.testing.assert_allclose(value, referee.values[name], atol=2e-3)  # float32 sums in another order, under Adam
        assert ((value == 0) == (referee.values[name] == 0)).all()
    assert np.abs(kit.values(model)["first.bias"] - kit.values(start)["first.bias"]).max() > 1e-3


def test_what_is_ignored_stays_and_norms_learn(kit, monkeypatch):
    monkeypatch.setattr(reconstruction, "LEAST", 10**6)  # the rows that train judge, too: there is something to gain
    monkeypatch.setattr(reconstruction, "HOLD_OUT", 10**6)
    model = chain(kit)
    before = kit.values(model)
    run(kit, model, batches(kit), ignore=["*.up", "first", "last"], options=OPTIONS)
    after = kit.values(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert all(name.startswith(("blocks.0.", "blocks.1.", "blocks.2.")) for name in changed)
    assert not any(".up." in name for name in changed)
    assert any("norm" in name for name in changed)


def test_after_an_error_the_norms_are_as_they_were_too(kit, monkeypatch):
    monkeypatch.setattr(reconstruction, "LEAST", 10**6)
    monkeypatch.setattr(reconstruction, "HOLD_OUT", 10**6)
    from slimkit.core.sparse import sequential

    model, calls = chain(kit), []
    before = kit.values(model)

    def fails(host, block, options):
        calls.append(block)
        reconstruct(host, block, options)
        if len(calls) == 2:
            raise ArgumentError("no more")

    monkeypatch.setattr(sequential, "reconstruct", lambda *a: fails(*a) or {})
    with pytest.raises(ArgumentError, match="no more"):
        run(kit, model, batches(kit), options=OPTIONS)
    for name, value in kit.values(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_training_ends_when_held_out_rows_gain_nothing(kit):
    report, _ = run(kit, chain(kit), batches(kit), options={"passes": 50, "rate": 5.0, "patience": 1})
    rows = [row for row in report["layers"].values() if "passes" in row]
    assert all(row["passes"] < 50 and row["block_error"] <= row["block_error_before"] for row in rows)


def test_the_dense_outputs_are_needed(kit):
    for kw in ({"asymmetric": False}, {"sequential": False}):
        with pytest.raises(ConfigError, match="dense outputs"):
            SparseConfig(method="block", **kw)
    with pytest.raises(ConfigError, match="residual"):
        SparseConfig(method="block", residual=True)
    with pytest.raises(ArgumentError, match="passes"):
        SparseConfig(method="block", options={"rounds": 3})


@pytest.mark.parametrize(
    "wrong", [{"passes": 0}, {"patience": 1.5}, {"rate": -1.0}, {"rate": "fast"}, {"inherited": 2.0}, {"start": "mean"}]
)
def test_options_are_checked_at_the_door(wrong):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=next(iter(wrong))):
        SparseConfig(method="block", options=wrong)


def test_it_may_begin_with_par_v2s_masks(kit):
    one, other = chain(kit), chain(kit)
    _, masks = run(kit, one, batches(kit)[:2], options={"start": "par_v2", "passes": 1, "rate": 0.0})
    _, plain = run(kit, other, batches(kit)[:2], method="par_v2")
    for name, mask in masks.items():
        assert (np.asarray(mask) == np.asarray(plain[name])).all()
    for name, value in kit.values(one).items():
        np.testing.assert_array_equal(value, kit.values(other)[name])


def test_only_a_block_whose_inputs_lost_something_makes_up_for_it(kit, monkeypatch):
    monkeypatch.setattr(reconstruction, "LEAST", 10**6)
    monkeypatch.setattr(reconstruction, "HOLD_OUT", 10**6)
    found = []
    for inherited in (0.0, 1.0):
        model, options = chain(kit), {"passes": 2, "inherited": inherited}
        run(kit, model, batches(kit)[:4], ignore=["first", "last", "blocks.2.*"], options=options)
        found.append(kit.values(model))
    np.testing.assert_array_equal(found[0]["blocks.0.up.weight"], found[1]["blocks.0.up.weight"])
    assert not np.array_equal(found[0]["blocks.1.up.weight"], found[1]["blocks.1.up.weight"])


def test_measured_ratios_are_kept_through_training(kit):
    data = batches(kit)
    model, par = chain(kit), chain(kit)
    report, masks = run(kit, model, data, uniform=False, options={"passes": 2})
    plain, _ = run(kit, par, data, uniform=False, method="par")
    assert report["allocation"] == plain["allocation"]
    ratios = {name: row["ratio"] for name, row in report["layers"].items()}
    assert ratios == {name: row["ratio"] for name, row in plain["layers"].items()}
    assert report["zeros"] == plain["zeros"] == sum(int((~np.asarray(m)).sum()) for m in masks.values())


def test_zeros_stay_when_a_trained_block_is_trained_on(kit):
    model = kit.fill(kit.named(first=kit.linear(8, 12), act=kit.relu(), last=kit.linear(12, 4)))
    data = [kit.tensor(np.random.default_rng(i).standard_normal((48, 8)).astype(np.float32)) for i in range(4)]
    run(kit, model, data, options={"passes": 1})
    before = kit.values(model)
    with kit.slim.freeze_zeros(model):
        train(kit, model)
    after = kit.values(model)
    for name in ("first.weight", "last.weight"):
        assert ((after[name] == 0) == (before[name] == 0)).all()
        assert np.abs(after[name] - before[name]).max() > 1e-3


def test_padding_and_silent_tokens_count_little(kit):
    target = kit.tensor(np.array([[[3, 4], [0, 0], [30, 40]]], np.float32))
    if kit.name != "torch":
        target = kit.array(target)
    weights, counts = token_weights(target, None)
    seen = np.asarray(weights).ravel() * np.array([25, 0, 2500])
    assert seen[2] > seen[0] > 0.4
    assert np.asarray(counts).sum() == 3
