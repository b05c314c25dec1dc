"""Exported files hold the opset asked for and answer like the model they came from."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import SlimkitError


def network(kit):
    net = kit.named(
        conv=kit.conv(1, 4, 3, padding=1),
        bn=kit.batch_norm(4),
        act=kit.relu(),
        conv2=kit.conv(4, 2, 3),
        act2=kit.relu(),
    )
    return kit.fill(net)


@pytest.fixture
def image(kit, rng):
    return kit.tensor(rng.standard_normal((2, 1, 8, 8)).astype(np.float32))


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_the_written_opset_is_the_one_asked_for_and_the_file_is_proven(kit, image, tmp_path, opset):
    import onnx

    net = network(kit)
    before = kit.values(net)
    report = kit.slim.export_onnx(net, image, tmp_path / "net.onnx", opset=opset)
    found = onnx.load(tmp_path / "net.onnx")
    assert found.opset_import[0].version == report.opset == opset
    assert report.max_difference < 1e-5  # float32, 36 terms
    assert report.operators["Conv"] == 2
    for name, value in kit.values(net).items():
        np.testing.assert_array_equal(value, before[name])


def test_zeros_survive_export(kit, image, tmp_path):
    net = network(kit)
    weight = next(p for n, p in kit.params(net).items() if n.startswith("conv2") and len(p.shape) == 4)
    values = kit.array(weight)
    values.reshape(-1)[::2] = 0
    kit.assign(weight, values)
    report = kit.slim.export_onnx(net, image, tmp_path / "net.onnx")
    assert report.zeros >= values.size // 2


def test_training_mode_comes_back(kit, image, tmp_path):
    net = network(kit)
    kit.train_mode(net, True)
    kit.slim.export_onnx(net, image, tmp_path / "net.onnx")
    assert kit.is_training(net)


@pytest.mark.parametrize("change", [{"opset": 3}, {"opset": "13"}, {"tolerance": -1.0}])
def test_bad_arguments_write_nothing(kit, image, tmp_path, change):
    with pytest.raises(SlimkitError):
        kit.slim.export_onnx(network(kit), image, tmp_path / "net.onnx", **change)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_refused(kit, image, tmp_path):
    with pytest.raises(TypeError):
        kit.slim.export_onnx("net", image, tmp_path / "net.onnx")
    with pytest.raises(ValueError):
        kit.slim.export_onnx(network(kit), (), tmp_path / "net.onnx")


def test_a_file_that_disagrees_is_not_written(kit, image, tmp_path):
    with pytest.raises(SlimkitError, match="differs from the model"):
        # Nothing agrees to the last bit with another runtime's convolution.
        kit.slim.export_onnx(network(kit), image * 1000, tmp_path / "net.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_delta_is_merged_on_a_copy(kit, rng, tmp_path):
    net = kit.fill(kit.named(first=kit.linear(8, 8), act=kit.relu(), last=kit.linear(8, 4)))
    x = kit.tensor(rng.standard_normal((3, 8)).astype(np.float32))
    plain = kit.slim.export_onnx(net, x, tmp_path / "plain.onnx")
    kit.slim.apply_delta(net, "lora", ["first"], rank=2)
    for name, parameter in kit.params(net).items():
        if "lora" in name:
            kit.assign(parameter, rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
    before, expected = kit.values(net), kit.array(net(x))
    report = kit.slim.export_onnx(net, x, tmp_path / "merged.onnx", merge_delta=True)
    assert report.operators == plain.operators, "nothing of the delta is left in the file"
    assert report.max_difference < 1e-4  # float32, the merged weight is rounded once more
    after = kit.values(net)
    assert list(after) == list(before)
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(kit.array(net(x)), expected)


def test_weights_go_beside_the_file_when_asked(kit, tmp_path):
    import onnxruntime

    net = kit.fill(kit.named(first=kit.linear(64, 64), act=kit.relu()))
    x = kit.tensor(np.ones((2, 64), np.float32))
    report = kit.slim.export_onnx(net, x, tmp_path / "net.onnx", external_data=True)
    assert report.data_file == "net.onnx.data"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    found = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {report.inputs[0]: kit.array(x)})[0]
    np.testing.assert_allclose(found, kit.array(net(x)), atol=1e-4)  # float32, 64 terms
