"""W8A8S folders from both wings: written from weights on the int8 grid, read back, and emulated."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, PatternError

BATCHES = [np.random.default_rng(k).standard_normal((32, 16)).astype(np.float32) for k in range(4)]


def compressed(kit, bits=8):
    model = kit.fill(kit.named(one=kit.linear(16, 24), act=kit.relu(), two=kit.linear(24, 8)))
    config = kit.slim.SparseConfig(method="hessian", sparse_ratio=0.4, weight_bits=bits)
    kit.slim.Compressor(model, config).compress([kit.tensor(b) for b in BATCHES])
    return model


def written(kit, folder, model, **more):
    return kit.slim.save_w8a8s(folder, model, [kit.tensor(b) for b in BATCHES], {"model_type": "none"}, **more)


@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
def test_the_emulated_model_answers_as_the_float_one_nearly(kit, tmp_path, ranges):
    model = compressed(kit)
    report = written(kit, tmp_path, model, ranges=ranges)
    assert list(report.layers) == ["one", "two"]
    assert report.zero_ratio == pytest.approx(0.4, abs=0.01)
    x = BATCHES[0]
    low, high = report.layers["one"]["low"], report.layers["one"]["high"]
    widest = (min(b.min() for b in BATCHES), max(b.max() for b in BATCHES))
    if ranges == "minmax":
        assert (low, high) == pytest.approx(widest, rel=1e-6)
    else:
        assert widest[0] < low < high < widest[1]
    assert report.layers["two"]["low"] == 0.0  # behind a ReLU
    dense = kit.array(model(kit.tensor(x)))
    read = kit.slim.load_w8a8s(tmp_path)
    # NumPy is the referee: the folder's own tensors, layer by layer.
    hidden = np.maximum(read.layers["one"](x), 0)
    referee = read.layers["two"](hidden)
    assert kit.slim.emulate_w8a8s(model, tmp_path) == ["one", "two"]
    emulated = kit.array(model(kit.tensor(x)))
    np.testing.assert_allclose(emulated, referee, atol=1e-5 * np.abs(referee).max())
    # Int8 inputs round by half a step of 1/255 of their range: about a hundredth of the answers.
    lost = np.linalg.norm(emulated - dense) / np.linalg.norm(dense)
    assert 0 < lost < (0.03 if ranges == "minmax" else 0.3)  # percentile cuts what lies far out


def test_the_whole_numbers_are_those_that_were_solved(kit, tmp_path):
    model = compressed(kit)
    weight = next(kit.array(p) for n, p in kit.params(model).items() if n.endswith("one.weight"))
    written(kit, tmp_path, model)
    layer = kit.slim.load_w8a8s(tmp_path).layers["one"]
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(layer.weight * step, weight, rtol=1e-5)
    assert np.array_equal(layer.weight == 0, weight == 0)
    np.testing.assert_allclose(layer.scale, layer.input_scale.astype(np.float32)[0] * step[:, 0], rtol=1e-6)


def test_weights_off_the_grid_are_refused_and_nothing_is_written(kit, tmp_path):
    model = compressed(kit, None)
    with pytest.raises(ArgumentError, match="int8 grid"):
        written(kit, tmp_path / "a", model)
    with pytest.raises(ArgumentError, match="weight_bits=8"):
        written(kit, tmp_path / "b", model, targets=["two"])
    with pytest.raises(PatternError):
        written(kit, tmp_path / "c", compressed(kit), targets=["three"])
    assert list(tmp_path.iterdir()) == []


def test_one_layer_alone_and_a_model_of_another_shape(kit, tmp_path):
    report = written(kit, tmp_path, compressed(kit), targets=["two"])
    assert (list(report.layers), "one.weight" in report.dense) == (["two"], True)
    other = kit.fill(kit.named(one=kit.linear(16, 24), act=kit.relu(), two=kit.linear(24, 9)))
    with pytest.raises(ArgumentError, match="'two'"):
        kit.slim.emulate_w8a8s(other, tmp_path)
