"""Smoothing before the int8 grid: loud channels are written smaller and read larger, and the model says the same."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.ascend.inputs import Inputs
from slimkit.core.ascend.smoothing import LIMITS, Rounding
from slimkit.core.errors import ArgumentError, ConfigError

BATCHES = [np.random.default_rng(k).standard_normal((32, 16)).astype(np.float32) for k in range(4)]
LOUD = np.where(np.arange(16) == 3, 40.0, 1.0).astype(np.float32)


def net(kit):
    """A norm with one loud channel, a layer, ReLU, a layer."""
    model = kit.fill(kit.named(norm=kit.layer_norm(16), one=kit.linear(16, 24), act=kit.relu(), two=kit.linear(24, 8)))
    params = of(kit, model)
    kit.assign(params["norm.weight"], LOUD)
    values = kit.array(params["one.weight"]).copy()
    values[:, 3] /= 40
    kit.assign(params["one.weight"], values)
    return model


def of(kit, model):
    """Parameters by PyTorch's names."""
    return {n.replace("gamma", "weight").replace("beta", "bias"): p for n, p in kit.params(model).items()}


def compressed(kit, **more):
    model = net(kit)
    config = kit.slim.SparseConfig(sparse_ratio=0.4, weight_bits=8, **{"method": "hessian", **more})
    return model, kit.slim.Compressor(model, config).compress([kit.tensor(b) for b in BATCHES])


def expected(kit):
    """The powers of two by NumPy, from the norm's outputs."""
    values = {n: kit.array(p).astype(np.float64) for n, p in of(kit, net(kit)).items()}
    rows = np.concatenate(BATCHES).astype(np.float64)
    normed = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5)
    x = (normed * values["norm.weight"] + values["norm.bias"]).astype(np.float32)
    picked = np.concatenate([part[np.linspace(0, 31, 16).astype(int)] for part in np.split(x, 4)])
    rounding = Rounding(
        [np.arange(16)],
        [values["one.weight"].astype(np.float32)],
        [Inputs(float(x.min()), float(x.max()), x.min(0), x.max(0), picked)],
    )
    errors = [rounding.error(rounding.powers(k)) for k in LIMITS]
    return rounding.powers(int(np.argmin(errors))), errors


def test_a_loud_channel_is_written_smaller_and_read_larger(kit, tmp_path):
    before = of(kit, net(kit))
    model, report = compressed(kit, method="magnitude", smooth=True)
    powers, errors = expected(kit)
    assert powers[3] == powers.max() >= 4
    after = of(kit, model)
    for name in ("norm.weight", "norm.bias"):
        np.testing.assert_array_equal(kit.array(after[name]) * 2.0**powers, kit.array(before[name]))
    # The ReLU hands a factor on: rows of the first layer are smaller where the second one reads them larger.
    row = report["smoothed"]["one"]
    assert row["factor"] == 2.0 ** powers.max()
    assert row["error"] == pytest.approx([errors[0], min(errors)], rel=1e-2)
    assert row["error"][1] < row["error"][0] / 3
    assert (sorted(report["smoothed"]), report["unsmoothed"]) == (["one", "two"], [])


def test_the_folder_loses_less_and_zeros_stay(kit, tmp_path):
    lost, answers = [], []
    for smooth in (False, True):
        model, report = compressed(kit, smooth=smooth)
        assert ("smoothed" in report) == smooth
        weight = kit.array(of(kit, model)["one.weight"])
        assert np.mean(weight == 0) == pytest.approx(0.4, abs=0.01)
        answers.append(kit.array(model(kit.tensor(BATCHES[0]))))
        given = [kit.tensor(b) for b in BATCHES]
        written = kit.slim.save_w8a8s(tmp_path / str(smooth), model, given, {"model_type": "none"}, most_error=1.0)
        lost.append(written.layers["one"]["input_error"])
        kit.slim.emulate_w8a8s(model, tmp_path / str(smooth))
        emulated = kit.array(model(kit.tensor(BATCHES[0])))
        answers.append(np.linalg.norm(emulated - answers[-1]) / np.linalg.norm(answers[-1]))
    assert lost[1] < lost[0] / 3
    assert answers[3] < answers[1] / 2


def test_what_fails_afterwards_leaves_the_model_as_it_was(kit):
    model = net(kit)
    before = {n: kit.array(p) for n, p in of(kit, model).items()}
    spoilt = [kit.tensor(b) for b in BATCHES[:3]] + [kit.tensor(np.full((32, 16), np.nan, np.float32))]
    config = kit.slim.SparseConfig(method="hessian", weight_bits=8, smooth=True)
    with pytest.raises(ArgumentError, match="finite"):
        kit.slim.Compressor(model, config).compress(spoilt)
    # A later batch whose sums overflow: smoothing is done by then.
    huge = [kit.tensor(b) for b in BATCHES]
    stopped = kit.slim.Compressor(model, config)
    with pytest.raises(KeyboardInterrupt):
        stopped.compress(huge, on_progress=lambda step: (_ for _ in ()).throw(KeyboardInterrupt()))
    for name, parameter in of(kit, model).items():
        np.testing.assert_array_equal(kit.array(parameter), before[name])


def test_smoothing_is_for_int8_layers(kit):
    for more in ({}, {"weight_bits": 4}, {"mantissa_bits": 2}):
        with pytest.raises(ConfigError, match="weight_bits=8"):
            kit.slim.SparseConfig(method="hessian", smooth=True, **more)
    assert kit.slim.SparseConfig(method="magnitude", weight_bits=8, smooth=True).needs_data
