"""Weights that an ONNX file would hold twice are stored once, and the file answers as before."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.onnxshared import store_once

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def graph(weights, inputs=()):
    """ids -> Gather(table) -> MatMul with each of the weights, summed."""
    helper, numbers = onnx.helper, onnx.numpy_helper
    table = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    held = {"table": table, **{name: make(table) for name, make in weights.items()}}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["h"])]
    nodes += [helper.make_node("MatMul", ["h", name], [f"out_{name}"]) for name in weights]
    outputs = [
        helper.make_tensor_value_info(f"out_{n}", onnx.TensorProto.FLOAT, [3, held[n].shape[1]]) for n in weights
    ]
    values = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [3])]
    values += [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, held[n].shape) for n in inputs]
    made = helper.make_graph(nodes, "g", values, outputs, [numbers.from_array(a, n) for n, a in held.items()])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def answer(proto):
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.array([3, 1, 199])})


def other(table):
    changed = table.T.copy()
    changed[5, 7] += 1
    return changed


def signed(table):
    table[0, 0] = 0.0
    changed = table.T.copy()
    changed[0, 0] = -0.0
    return changed


CASES = {
    "turned": ({"head": lambda t: t.T.copy()}, (), ["head"]),
    "turned and twice": ({"head": lambda t: t.T.copy(), "again": lambda t: t.T.copy()}, (), ["head", "again"]),
    "the same": ({"a": lambda t: t.T + 1, "b": lambda t: t.T + 1}, (), ["b"]),
    "one number differs": ({"head": other}, (), []),
    "a sign of zero differs": ({"head": signed}, (), []),
    "small": ({"a": lambda t: t.T[:, :9].copy(), "b": lambda t: t.T[:, :9].copy()}, (), []),
    "may be given anew": ({"head": lambda t: t.T.copy()}, ("head",), []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_equal_is_stored_once_and_the_answers_stay(name):
    weights, inputs, expected = CASES[name]
    proto = graph(weights, inputs)
    before, size = answer(proto), proto.ByteSize()
    held = {t.name for t in proto.graph.initializer}
    assert store_once(proto) == expected
    assert {t.name for t in proto.graph.initializer} == held - set(expected)
    onnx.checker.check_model(proto)
    for first, second in zip(before, answer(proto)):
        np.testing.assert_array_equal(first, second)
    assert size - proto.ByteSize() == pytest.approx(len(expected) * 200 * 32 * 4, abs=400)  # a node is small
