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
    # percentile cuts what lies far out, of so few rows a sixth of the second layer's answers.
    report = written(kit, tmp_path, model, ranges=ranges, most_error=0.1 if ranges == "minmax" else 0.3)
    assert (list(report.layers), report.kept_float) == (["one", "two"], {})
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
    assert 0 < lost < (0.03 if ranges == "minmax" else 0.3)


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


HUGE = [np.concatenate([b, 5_000 * np.ones((1, 16), np.float32)]) for b in BATCHES]


def test_a_layer_that_a_few_huge_inputs_leave_no_step_for_stays_float_and_is_named(kit, tmp_path, caplog):
    model = compressed(kit)
    given = [kit.tensor(b) for b in HUGE]
    with pytest.raises(ArgumentError, match=r"'one' changes .* 2 of the 2 targets"):
        kit.slim.save_w8a8s(tmp_path / "a", model, given, {"model_type": "none"}, targets=["*"])
    with pytest.raises(ArgumentError, match="no layer is left"):
        kit.slim.save_w8a8s(tmp_path / "a", model, given, {"model_type": "none"})
    assert list(tmp_path.iterdir()) == []
    # Whoever wants it all the same has what the report foretells.
    report = kit.slim.save_w8a8s(tmp_path / "b", model, given, {"model_type": "none"}, most_error=1e9)
    layer = kit.slim.load_w8a8s(tmp_path / "b").layers["one"]
    weight = next(kit.array(p) for n, p in kit.params(model).items() if n.endswith("one.weight"))
    bias = next(kit.array(p) for n, p in kit.params(model).items() if n.endswith("one.bias"))
    exact = BATCHES[0] @ weight.T
    lost = np.linalg.norm(layer(BATCHES[0]) - bias - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert report.layers["one"]["input_error"] == pytest.approx(np.median(lost), rel=0.3)
    assert np.median(lost) > 0.5


def test_huge_inputs_of_one_layer_leave_the_others_int8(kit, tmp_path, caplog):
    """The second layer alone sees them: a unit of the first that only one row wakes."""
    model = kit.fill(kit.named(one=kit.linear(16, 24), act=kit.relu(), two=kit.linear(24, 8)))
    params = kit.params(model)
    weight = next(p for n, p in params.items() if n.endswith("one.weight"))
    values = kit.array(weight).copy()
    values[0] = 0
    values[0, 0] = 1_000
    kit.assign(weight, values)
    batches = [b.copy() for b in BATCHES]
    for b in batches:
        b[:, 0] = -np.abs(b[:, 0])
        b[0, 0] = 3
    given = [kit.tensor(b) for b in batches]
    config = kit.slim.SparseConfig(method="hessian", sparse_ratio=0.4, weight_bits=8)
    kit.slim.Compressor(model, config).compress(given)
    caplog.clear()
    report = kit.slim.save_w8a8s(tmp_path, model, given, {"model_type": "none"})
    assert (list(report.layers), list(report.kept_float)) == (["one"], ["two"])
    assert report.kept_float["two"] > 0.1 > report.layers["one"]["input_error"]
    assert "1 of 2 layers on the int8 grid stay float16" in caplog.text
    assert "'two'" in caplog.text
    assert kit.slim.emulate_w8a8s(model, tmp_path) == ["one"]


def test_attention_that_reads_its_weights_itself_stays_float_and_is_named(kit, tmp_path):
    """Its output layer was written as int8, and the emulated model ended with an error."""
    cells = kit.torch.nn if kit.name == "torch" else kit.ms.nn

    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = cells.MultiheadAttention(16, 2, batch_first=True), kit.linear(16, 8)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0])

        construct = forward

    model = kit.fill(Net())
    data = [kit.tensor(b.reshape(4, 8, 16)) for b in BATCHES]
    kit.slim.Compressor(model, kit.slim.SparseConfig(method="par", sparse_ratio=0.3, weight_bits=8)).compress(data)
    report = kit.slim.save_w8a8s(tmp_path, model, data, {"model_type": "none"}, most_error=1.0)
    assert list(report.layers) == ["last"]
    assert "attention.out_proj.weight" in report.dense
    before = kit.array(model(data[0]))
    assert kit.slim.emulate_w8a8s(model, tmp_path) == ["last"]
    assert np.linalg.norm(kit.array(model(data[0])) - before) < 0.1 * np.linalg.norm(before)
    with pytest.raises(PatternError, match="out_proj"):
        kit.slim.save_w8a8s(tmp_path, model, data, {"model_type": "none"}, targets=["attention.out_proj"])
