"""ONNX files that are damaged, truncated or hostile: FileFormatError or findings, never anything else."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from slimkit.core.ascend import check_onnx
from slimkit.core.errors import FileFormatError, LinkPathError


def model(**changes):
    """Conv, Relu, Reshape, MatMul with weights, a constant and an attribute of every kind that is read."""
    weights = {"c": np.ones((8, 4, 3, 3), np.float32), "m": np.ones((8 * 36, 5), np.float32), "s": np.array([1, -1])}
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["a"], "conv", group=1, auto_pad="VALID"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Reshape", ["b", "s"], ["r"], "reshape"),
        helper.make_node("Constant", [], ["k"], "k", value=numpy_helper.from_array(np.float32([2]))),
        helper.make_node("MatMul", ["r", "m"], ["d"], "matmul"),
        helper.make_node("Mul", ["d", "k"], ["y"], "mul"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


WHOLE = model().SerializeToString()


def check(folder, data):
    file = folder / "m.onnx"
    file.write_bytes(data)
    return check_onnx(file, "A2")


def test_the_whole_file_is_accepted(tmp_path):
    found = check(tmp_path, WHOLE)
    assert found.exit_code == 0
    assert found.waste["layers_with_macs"] == 2


@given(cut=st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_refused(tmp_path_factory, cut):
    with pytest.raises(FileFormatError, match="ONNX"):
        check(tmp_path_factory.mktemp("t"), WHOLE[:cut])


@given(
    places=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.sampled_from("set cut copy".split())),
        min_size=1, max_size=6,
    )
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_changed_bytes_end_in_findings_or_in_one_error(tmp_path_factory, places):
    data = bytearray(WHOLE)
    for place, byte, how in places:
        place %= len(data)
        if how == "set":
            data[place] = byte
        elif how == "cut":
            del data[place : place + 1 + byte % 20]
        else:
            data[place:place] = data[place : place + byte]
        data = data or bytearray(b"\0")
    # Anything but FileFormatError fails the test by itself.
    with contextlib.suppress(FileFormatError):
        assert check(tmp_path_factory.mktemp("f"), bytes(data)).to_dict()["exit_code"] in (0, 1)


def broken(change):
    proto = model()
    change(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.ClearField("graph"), "holds no graph"),
        (lambda m: m.ClearField("opset_import"), "no version of the default operators"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**62), "holds 1152 bytes where"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -8), "negative size"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "99 is no data type"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.DOUBLE), "holds 1152 bytes where 2304"),
        (lambda m: m.graph.node[1].input.__setitem__(0, "nowhere"), "reads 'nowhere', which nothing before it writes"),
        (lambda m: setattr(m.graph.output[0], "name", "nowhere"), "nothing writes its output 'nowhere'"),
        (lambda m: setattr(m.graph.node[1], "op_type", ""), "has no operator"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1), "negative size"),
        (
            lambda m: m.graph.node.extend([m.graph.node[0]] * 2) or m.graph.ClearField("node"),
            "nothing writes its output",
        ),
    ],
)
def test_files_that_parse_and_lie_are_refused(tmp_path, change, message):
    with pytest.raises(FileFormatError, match=r"m\.onnx is a damaged ONNX file") as caught:
        check(tmp_path, broken(change))
    assert message in str(caught.value)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "", "a/../../b"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    def change(proto):
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    with pytest.raises(FileFormatError, match="inside its folder"):
        check(tmp_path, broken(change))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 1152)
    os.symlink(tmp_path / "secret.bin", tmp_path / "inner" / "w.bin")

    def change(proto):
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", "0")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    with pytest.raises(FileFormatError, match="inside its folder"):
        check(tmp_path / "inner", broken(change))


def test_names_that_are_no_text_are_refused(tmp_path):
    # Implementations of protobuf notice it at different places, in different words.
    with pytest.raises(FileFormatError, match=r"(?i)utf-8"):
        check(tmp_path, WHOLE.replace(b"matmul", b"mat\xff\xfel"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="existing file"):
        check_onnx(tmp_path / "none.onnx", "A2")
    with pytest.raises(FileFormatError, match="existing file"):
        check_onnx(tmp_path, "A2")
    for data in (b"", b"\0" * 100, b"PK\x03\x04", b'{"a": 1}', os.urandom(200)):
        with pytest.raises(FileFormatError):
            check(tmp_path, data)
    os.symlink(tmp_path / "m.onnx", tmp_path / "link.onnx")
    with pytest.raises(LinkPathError):
        check_onnx(tmp_path / "link.onnx", "A2")
    with open(tmp_path / "big.onnx", "wb") as handle:
        handle.truncate(2**31)
    with pytest.raises(FileFormatError, match="larger than 2 GB"):
        check_onnx(tmp_path / "big.onnx", "A2")


def test_shapes_that_contradict_each_other_cost_the_counts_and_nothing_else(tmp_path):
    def change(proto):
        proto.graph.node[0].attribute[0].i = 3

    found = check(tmp_path, broken(change))
    assert found.operators["Conv"] == 1
    assert onnx.load(tmp_path / "m.onnx").graph.node


OPERATORS = ["Conv", "MatMul", "Gemm", "Slice", "Reshape", "Shape", "Gather", "Concat", "LayerNormalization", "If"]
SIZES = [-(2**63), -1, 0, 1, 3, 16, 2**31, 2**63 - 1]


@given(
    edits=st.lists(
        st.tuples(st.sampled_from(["dims", "dtype", "operator", "attribute", "input", "opset", "reads"]),
                  st.integers(0, 30), st.sampled_from(SIZES), st.sampled_from(OPERATORS)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_changed_fields_end_in_findings_or_in_one_error(tmp_path_factory, edits):
    proto = model()
    graph = proto.graph
    for what, place, size, operator in edits:
        node = graph.node[place % len(graph.node)]
        tensor = graph.initializer[place % len(graph.initializer)]
        if what == "dims":
            tensor.dims[0] = size
        elif what == "dtype":
            tensor.data_type = place
        elif what == "operator":
            node.op_type = operator
        elif what == "attribute":
            node.attribute.append(helper.make_attribute("axis" if place % 2 else "group", size))
        elif what == "input":
            graph.input[0].type.tensor_type.shape.dim[place % 4].dim_value = size
        elif what == "opset":
            proto.opset_import[0].version = size
        elif node.input:
            node.input[place % len(node.input)] = tensor.name
    with contextlib.suppress(FileFormatError):
        assert check(tmp_path_factory.mktemp("e"), proto.SerializeToString()).exit_code in (0, 1)
