"""Open axes of ONNX files: written as asked, proven at two sizes, and refused where the model takes one size only."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit import ArgumentError, UnsupportedError, export_onnx
from slimkit.core.errors import ConfigError
from slimkit.core.onnxaxes import open_axes, other_sizes, parse_axes

import torch
from torch import nn

BOTH = {0: "batch", 1: "sequence"}


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokens(batch, sequence):
    ids = torch.arange(batch * sequence).reshape(batch, sequence) % 50
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("opset", "size"), [(13, (1, 32)), (18, (1, 8))])
def test_a_bert_takes_texts_of_any_number_and_length(bert, tmp_path, opset, size):
    import onnxruntime

    report = export_onnx(bert, tokens(*size), tmp_path / "m.onnx", opset=opset, dynamic=BOTH)
    assert report.opset == opset
    assert report.open_axes == {"input_ids": BOTH, "attention_mask": BOTH}
    assert report.max_difference < 1e-5  # float32, 32 terms
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [i.shape for i in session.get_inputs()] == [["batch", "sequence"]] * 2
    assert session.get_outputs()[0].shape == ["batch", 2]
    for batch, sequence in ((1, 1), (3, 5), (5, 31)):
        inputs = tokens(batch, sequence)
        with torch.no_grad():
            wanted = bert(**inputs).logits
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_one_input_may_have_an_open_axis_and_another_none(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x.repeat(1, 2) * scale

    inputs = {"x": torch.randn(3, 4), "scale": torch.randn(3, 1)}
    report = export_onnx(Scaled(), inputs, tmp_path / "m.onnx", dynamic={"x": {1: "width"}})
    assert report.open_axes == {"x": {1: "width"}}
    import onnx

    shape = onnx.load(tmp_path / "m.onnx").graph.output[0].type.tensor_type.shape
    assert [d.dim_value or d.dim_param for d in shape.dim] == [3, "output_1"]  # twice the width: no axis has its name


class Fixed(nn.Module):
    """A size written into the model, which a trace at one size would not show."""

    def forward(self, x):
        return x + torch.ones(x.shape[1]) * int(x.shape[1])


def test_a_size_that_a_trace_makes_a_constant_is_found_by_the_second_size(tmp_path):
    with pytest.raises(UnsupportedError, match=r"does not run|differs"):
        export_onnx(Fixed(), torch.randn(2, 8), tmp_path / "m.onnx", dynamic={1: "width"})
    with pytest.raises(UnsupportedError, match=r"does not run with width 4.*leave that axis"):
        export_onnx(nn.Linear(8, 2), torch.randn(2, 8), tmp_path / "m.onnx", dynamic={1: "width"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"inptu": {0: "batch"}}, "Did you mean 'input'"),
        ({"input": {2: "batch"}}, "axis 2"),
        ({3: "batch"}, "axis 3"),
        ({"input": 0}, "mapping"),
        ({0: "n", 1: "n"}, "names axes of 2 and of 8"),
        (["batch"], "mapping"),
        ({0: ""}, "dynamic"),
    ],
)
def test_axes_that_are_not_there_are_refused(tmp_path, dynamic, words):
    with pytest.raises((ArgumentError, TypeError), match=words):
        export_onnx(nn.Linear(8, 2), torch.randn(2, 8), tmp_path / "m.onnx", dynamic=dynamic)
    assert list(tmp_path.iterdir()) == []


def test_negative_axes_and_the_command_lines_words():
    assert open_axes({-1: "width"}, False, {"x": (2, 3)}) == {"x": {1: "width"}}
    assert other_sizes({"x": BOTH}, {"x": (2, 3)}) == {"batch": (2, 3), "sequence": (3, 2)}
    assert parse_axes(["a=0:n", "b=0:n,2:m"]) == {"a": {0: "n"}, "b": {0: "n", 2: "m"}}
    for wrong in (["batch"], ["a="], ["=0:n"], ["0"], ["0:n", "a=0:n"]):
        with pytest.raises(ConfigError, match="--dynamic"):
            parse_axes(wrong)
