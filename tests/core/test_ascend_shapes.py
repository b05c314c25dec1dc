"""Shape tensors are followed as NumPy does, and whole numbers are divided as ONNX does."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slimkit.core.ascend.shapes import infer


def chain(rows, inputs, weights, opset=13):
    nodes = [helper.make_node(op, given, [out], out, **at) for op, given, out, at in rows]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(rows[-1][2], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(v), n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_a_reshape_by_computed_sizes_is_followed():
    model = chain(
        [
            ("Shape", ["x"], "s", {}),
            ("Gather", ["s", "last"], "width", {"axis": 0}),
            ("Div", ["width", "heads"], "size", {}),
            ("Unsqueeze", ["size", "zero"], "size1", {}),
            ("Slice", ["s", "zero", "two"], "front", {}),
            ("Concat", ["front", "heads1", "size1"], "to", {"axis": 0}),
            ("Reshape", ["x", "to"], "y", {}),
        ],
        [("x", [2, 7, 34])],
        {"last": 2, "heads": 4, "heads1": [-1], "zero": [0], "two": [2]},
    )
    # 34 / 4 is 8 in whole numbers, and -1 takes the rest: no reshape of 34 columns.
    assert infer(onnx, model, ["y"]).get("y", (None,)) != (2, 7, 4, 8)
    assert infer(onnx, chain_with(model, 32), ["y"])["y"] == (2, 7, 4, 8)


def chain_with(model, width):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = width
    return model


def test_negative_numbers_divide_towards_zero_and_slices_run_backwards():
    model = chain(
        [
            ("Div", ["a", "b"], "q", {}),
            ("Neg", ["q"], "n", {}),
            ("Slice", ["v", "minus", "least", "zero", "minus"], "r", {}),
            ("Gather", ["r", "n0"], "g", {}),
            ("Concat", ["n", "g"], "to", {"axis": 0}),
            ("Reshape", ["x", "to"], "y", {}),
        ],
        [("x", [3, 5])],
        {"a": [-7], "b": [2], "v": [1, 2, 5], "minus": [-1], "least": [-(2**63)], "zero": [0], "n0": [0]},
    )
    # -7 / 2 is -3, so (3, 5) keeps its shape; rounding down would ask for (4, 5).
    assert infer(onnx, model, ["y"])["y"] == (3, 5)


def test_what_cannot_be_followed_stays_open():
    model = chain([("Reshape", ["x", "s"], "y", {})], [("x", [2, 3]), ("s", [2])], {})
    assert None in infer(onnx, model, ["y"]).get("y", (None,))
