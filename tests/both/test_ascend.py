"""Ascend from both wings: exported files are checked, sparse models become W16A16S folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError


def net(kit):
    return kit.fill(kit.named(norm=kit.layer_norm(32), one=kit.linear(32, 48), act=kit.relu(), two=kit.linear(48, 10)))


def four_two(kit, model):
    """Two zeros among every four input channels of the first layer."""
    for name, parameter in kit.params(model).items():
        if name.endswith("one.weight"):
            values = kit.array(parameter)
            values[:, 0::4] = values[:, 2::4] = 0
            kit.assign(parameter, values)
    return model


def test_an_exported_file_is_checked(kit, tmp_path):
    file = tmp_path / "m.onnx"
    kit.slim.export_onnx(four_two(kit, net(kit)), kit.tensor(np.ones((1, 32), np.float32)), str(file), opset=13)
    found = kit.slim.check_onnx(file, "A2")
    assert found.exit_code == 0, found.of("error")
    assert found.opset == 13
    assert sorted(layer.shape for layer in found.layers) == [(10, 48), (48, 32)]
    assert found.waste["layers_with_macs"] == 2
    # The order of the axes survives the export: the zeros are along the input channels of the first layer.
    assert "--sparsity=1" in found.command
    assert isinstance(found, kit.slim.OnnxCheck)


def test_a_sparse_model_becomes_a_w16a16s_folder(kit, tmp_path):
    model = four_two(kit, net(kit))
    before = kit.values(model)
    report = kit.room("ascend").save_w16a16s(tmp_path, model, {"model_type": "none"})
    assert report.sparse == {"one.weight": 0.5}
    read = kit.slim.load_w16a16s(tmp_path)
    # Torch's names in both wings: the readers of these folders know no others.
    assert set(read.kinds) == {"norm.weight", "norm.bias", "one.weight", "one.bias", "two.weight", "two.bias"}
    assert [n for n, k in read.kinds.items() if k == "W16A16S"] == ["one.weight"]
    values = {n.replace("gamma", "weight").replace("beta", "bias"): v for n, v in before.items()}
    for name, value in values.items():
        np.testing.assert_array_equal(read.tensors[name], value.astype(np.float16))
    for name, value in kit.values(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_both_wings_write_the_same_bytes(kit, tmp_path):
    kit.slim.save_w16a16s(tmp_path, four_two(kit, net(kit)), {"model_type": "none"})
    read = kit.slim.load_w16a16s(tmp_path)
    kit.slim.save_w16a16s(tmp_path / "again", dict(sorted(read.tensors.items())), read.config)
    again = kit.slim.load_w16a16s(tmp_path / "again")
    for name, value in read.tensors.items():
        np.testing.assert_array_equal(value, again.tensors[name])
    description = json.loads((tmp_path / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W16A16S"


def test_the_config_of_the_model_is_taken(kit, tmp_path):
    class Config:
        def to_dict(self):
            return {"model_type": "own", "torch_dtype": "float32"}

    model = four_two(kit, net(kit))
    with pytest.raises(ArgumentError, match="config must be a dict or a Hugging Face folder"):
        kit.slim.save_w16a16s(tmp_path, model)
    model.config = Config()
    kit.slim.save_w16a16s(tmp_path, model)
    assert kit.slim.load_w16a16s(tmp_path).config == {
        "model_type": "own", "torch_dtype": "float16", "quantize": "w16a16s"
    }  # fmt: skip


def test_what_is_no_model_is_refused(kit, tmp_path):
    with pytest.raises(ArgumentTypeError, match="model must be"):
        kit.slim.save_w16a16s(tmp_path, 3, {})
    with pytest.raises(ArgumentError, match="Sparsify the model first"):
        kit.slim.save_w16a16s(tmp_path, net(kit), {})


def test_padding_from_shapes_alone(kit):
    [waste] = kit.slim.padded_waste({"fc": (10, 48)}, "310P")
    assert waste.padded_bytes == 16 * 48 * 2
