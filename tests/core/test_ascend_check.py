"""`check_onnx` on real ONNX files: what it finds, what it leaves alone, and the line it offers."""

from __future__ import annotations

import json
import shlex

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimkit.core.ascend import check_onnx
from slimkit.core.errors import ArgumentError, ArgumentTypeError

RNG = np.random.default_rng(0)


def save(path, nodes, inputs, outputs, weights=None, opset=13, domains=(), **save_options):
    """An ONNX file from (op, inputs, output, attributes) rows."""
    made = [
        helper.make_node(op, given, [out], name=out, **attributes)
        if ":" not in op
        else helper.make_node(op.split(":")[1], given, [out], name=out, domain=op.split(":")[0], **attributes)
        for op, given, out, attributes in nodes
    ]
    values = [helper.make_tensor_value_info(n, k, s) for n, k, s in (*inputs, *outputs)]
    graph = helper.make_graph(
        made,
        "g",
        values[: len(inputs)],
        values[len(inputs) :],
        [numpy_helper.from_array(v, n) for n, v in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(path), **save_options)
    return path


def dense(path, n_in, n_out, opset=13, weight=None, batch=1, kind=TensorProto.FLOAT, **options):
    """A MatMul with one weight of (in, out)."""
    weight = RNG.standard_normal((n_in, n_out)).astype(np.float32) if weight is None else weight
    return save(
        path,
        [("MatMul", ["x", "w"], "y", {})],
        [("x", kind, [batch, n_in])],
        [("y", kind, [batch, n_out])],
        {"w": weight},
        opset,
        **options,
    )


def rules(found, severity=None):
    return {f.rule for f in found.findings if severity in (None, f.severity)}


def one(found, rule):
    [finding] = [f for f in found.findings if f.rule == rule]
    return finding


def test_a_fitting_file_is_clean_and_the_command_is_ready(tmp_path):
    found = check_onnx(dense(tmp_path / "m.onnx", 256, 512), "310P")
    assert found.exit_code == 0
    assert not rules(found, "error") | rules(found, "warning")
    assert found.command_ready
    words = shlex.split(found.command)
    assert words[0] == "atc"
    assert "--framework=5" in words
    assert "--soc_version=Ascend310P3" in words
    assert "--input_shape=x:1,256" in words
    assert f"--output={tmp_path / 'm'}" in words
    assert found.waste["wasted_bytes"] == 0
    assert found.waste["macs"] == 256 * 512
    # One row fills a block of sixteen.
    assert found.waste["padded_macs"] == 16 * 256 * 512


def test_the_result_is_plain_json_with_a_version(tmp_path):
    found = check_onnx(dense(tmp_path / "m.onnx", 20, 10), "A2", "8.5.0")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["format"] == "slimkit-ascend-check"
    assert plain["version"] == 1
    assert plain["counts"]["warning"] == len(found.of("warning")) >= 1
    assert plain["operators"] == {"MatMul": 1}
    assert plain["layers"][0]["shape"] == [10, 20]
    assert all(s["url"] for s in plain["sources"])
    severities = [f["severity"] for f in plain["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_paths_with_spaces_and_quotes_stay_one_word(tmp_path):
    folder = tmp_path / "a b'c;d"
    folder.mkdir()
    found = check_onnx(dense(folder / "m.onnx", 16, 16), "310P")
    assert f"--model={folder / 'm.onnx'}" in shlex.split(found.command)


@pytest.mark.parametrize(("cann", "bad"), [("5.0.4", 14), ("6.0.1", 14), ("7.0.0", 19), ("8.0", 20), ("9.0", 19)])
def test_an_opset_beyond_the_documents_is_an_error(tmp_path, cann, bad):
    assert check_onnx(dense(tmp_path / "m.onnx", 16, 16, opset=13), "310P", cann).exit_code == 0
    found = check_onnx(dense(tmp_path / "m.onnx", 16, 16, opset=bad), "310P", cann)
    assert found.exit_code == 1
    assert one(found, "opset").severity == "error"
    assert one(found, "opset").source.startswith("https://")


def activation(path, operator, opset, **attributes):
    shape = ("x", TensorProto.FLOAT, [1, 32]), ("y", TensorProto.FLOAT, [1, 32])
    return save(path, [(operator, ["x"], "y", attributes)], shape[:1], shape[1:], opset=opset)


def test_operators_outside_the_list_are_errors_with_a_way_out(tmp_path):
    found = check_onnx(activation(tmp_path / "m.onnx", "Mish", 18), "A2")
    finding = one(found, "operator")
    assert finding.severity == "error"
    assert "Mish (1 node) is not in the list" in finding.message
    assert "softplus" in finding.remedy
    assert check_onnx(activation(tmp_path / "m.onnx", "Relu", 18), "A2").exit_code == 0


def test_an_operator_documented_for_other_opsets_is_a_warning(tmp_path):
    file = save(
        tmp_path / "m.onnx",
        [("Unsqueeze", ["x", "axes"], "y", {})],
        [("x", TensorProto.FLOAT, [1, 16])],
        [("y", TensorProto.FLOAT, [1, 1, 16])],
        {"axes": np.array([1])},
    )
    finding = one(check_onnx(file, "310P", "5.0.4"), "operator-opset")
    assert finding.severity == "warning"
    assert "documented for opset 8-12, the file has 13" in finding.message
    assert finding.remedy == "export with opset 12"
    assert "operator-opset" not in rules(check_onnx(file, "310P", "8.0"))


def test_other_domains_and_functions_are_errors(tmp_path):
    values = [("x", TensorProto.FLOAT, [1, 16])], [("y", TensorProto.FLOAT, [1, 16])]
    file = save(tmp_path / "m.onnx", [("com.microsoft:FusedGelu", ["x"], "y", {})], *values, domains=["com.microsoft"])
    found = check_onnx(file, "310P")
    assert "com.microsoft::FusedGelu" in one(found, "operator").message
    model = onnx.load(file)
    model.functions.append(
        helper.make_function("com.microsoft", "FusedGelu", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])],
                             [helper.make_opsetid("", 13)])
    )  # fmt: skip
    onnx.save(model, file)
    assert "inline" in one(check_onnx(file, "310P"), "function").remedy


def test_operators_of_inner_graphs_are_seen(tmp_path):
    def branch(operator, name):
        node = helper.make_node(operator, ["x"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16])])

    file = save(
        tmp_path / "m.onnx",
        [("If", ["c"], "y", {"then_branch": branch("Relu", "a"), "else_branch": branch("Mish", "b")})],
        [("x", TensorProto.FLOAT, [1, 16]), ("c", TensorProto.BOOL, [])],
        [("y", TensorProto.FLOAT, [1, 16])],
        opset=18,
    )
    found = check_onnx(file, "310P")
    assert found.operators == {"If": 1, "Mish": 1, "Relu": 1}
    assert "Mish" in one(found, "operator").message


def test_dtypes(tmp_path):
    half = dense(tmp_path / "h.onnx", 32, 32, weight=np.eye(32, dtype=np.float16), kind=TensorProto.FLOAT16)
    assert "precision" not in rules(check_onnx(half, "310P"))
    single = dense(tmp_path / "s.onnx", 32, 32)
    assert one(check_onnx(single, "310P"), "precision").severity == "info"
    origin = check_onnx(single, "310P", precision="origin")
    assert "--precision_mode=must_keep_origin_dtype" in origin.command
    assert "its page names float16 only" in one(origin, "dtype").message
    # Blocks of float32 are half as wide.
    assert origin.layers[0].dtype == "float32"
    double = dense(tmp_path / "d.onnx", 32, 32, weight=np.eye(32), kind=TensorProto.DOUBLE)
    assert any("float64" in f.message for f in check_onnx(double, "A2").of("warning"))
    ids = save(
        tmp_path / "i.onnx", [("Gather", ["w", "x"], "y", {})],
        [("x", TensorProto.INT64, [4])], [("y", TensorProto.FLOAT, [4, 16])], {"w": np.ones((8, 16), np.float32)},
    )  # fmt: skip
    assert one(check_onnx(ids, "310P"), "input-dtype").severity == "info"


def bfloat16(path):
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [32, 32], np.zeros(32 * 32), raw=False)
    values = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [1, 32]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), str(path))
    return path


def test_bfloat16_is_an_error_on_the_310p_alone(tmp_path):
    file = bfloat16(tmp_path / "b.onnx")
    found = check_onnx(file, "310P")
    assert found.exit_code == 1
    assert "does not compute in bfloat16" in one(found, "dtype").message
    assert check_onnx(file, "A2").exit_code == 0


def test_open_axes(tmp_path):
    batch = dense(tmp_path / "b.onnx", 16, 16, batch="n")
    found = check_onnx(batch, "310P")
    assert one(found, "dynamic-shape").severity == "warning"
    assert "--input_shape=x:-1,16" in found.command
    assert "--dynamic_batch_size=1,2,4,8" in found.command
    assert found.command_ready
    assert found.waste["macs"] is None
    fixed = check_onnx(batch, "310P", shapes={"x": [32, 16]})
    assert "dynamic-shape" not in rules(fixed)
    assert "--input_shape=x:32,16" in fixed.command
    assert fixed.waste["macs"] == 32 * 16 * 16
    sequence = save(
        tmp_path / "s.onnx", [("Relu", ["x"], "y", {})],
        [("x", TensorProto.FLOAT, ["n", "t"])], [("y", TensorProto.FLOAT, ["n", "t"])],
    )  # fmt: skip
    assert not check_onnx(sequence, "310P").command_ready
    with pytest.raises(ArgumentError, match="a key of shapes"):
        check_onnx(batch, "310P", shapes={"z": [1]})
    with pytest.raises(ArgumentError, match=r"of the form \['\?', 16\]"):
        check_onnx(batch, "310P", shapes={"x": [1, 8]})
    with pytest.raises(ArgumentTypeError):
        check_onnx(batch, "310P", shapes={"x": "1,16"})


def test_an_axis_of_length_zero_is_an_error(tmp_path):
    file = save(
        tmp_path / "z.onnx", [("Relu", ["x"], "y", {})],
        [("x", TensorProto.FLOAT, [0, 4])], [("y", TensorProto.FLOAT, [0, 4])],
    )  # fmt: skip
    assert "zero-dimension" in rules(check_onnx(file, "310P"), "error")


def conv(path, weight, group=1):
    return save(
        path, [("Conv", ["x", "w"], "y", {"group": group, "pads": [1, 1, 1, 1]})],
        [("x", TensorProto.FLOAT, [2, weight.shape[1] * group, 8, 8])],
        [("y", TensorProto.FLOAT, [2, weight.shape[0], 8, 8])], {"w": weight},
    )  # fmt: skip


def test_alignment_of_convolutions(tmp_path):
    odd = check_onnx(conv(tmp_path / "o.onnx", np.ones((40, 24, 3, 3), np.float32)), "310P")
    finding = one(odd, "alignment")
    assert finding.severity == "warning"
    assert "40 output channels" in finding.message
    assert "set_alignment(16)" in finding.remedy
    assert odd.layers[0].macs == 2 * 64 * 40 * 24 * 9
    assert odd.layers[0].padded_macs == 2 * 64 * 48 * 32 * 9
    assert not check_onnx(conv(tmp_path / "e.onnx", np.ones((48, 32, 3, 3), np.float32)), "310P").of("warning")
    grouped = check_onnx(conv(tmp_path / "g.onnx", np.ones((32, 8, 3, 3), np.float32), group=4), "310P")
    assert "4 groups" in one(grouped, "alignment").message
    assert grouped.layers == ()


def test_gemm_is_read_in_the_order_it_multiplies(tmp_path):
    for trans, shape in ((1, (10, 20)), (0, (20, 10))):
        file = save(
            tmp_path / "g.onnx", [("Gemm", ["x", "w"], "y", {"transB": trans})],
            [("x", TensorProto.FLOAT, [1, 20])], [("y", TensorProto.FLOAT, [1, 10])], {"w": np.ones(shape, np.float32)},
        )  # fmt: skip
        assert check_onnx(file, "310P").layers[0].shape == (10, 20)


def test_int8_blocks_are_32_channels_wide(tmp_path):
    file = dense(tmp_path / "q.onnx", 48, 16, weight=np.ones((48, 16), np.int8), kind=TensorProto.INT8)
    [layer] = check_onnx(file, "A2").layers
    assert (layer.weight_bytes, layer.padded_bytes) == (16 * 48, 16 * 64)
    assert "dynamic-shape" in rules(
        check_onnx(
            dense(tmp_path / "q.onnx", 32, 16, batch="n", weight=np.ones((32, 16), np.int8), kind=TensorProto.INT8),
            "A2",
        ),
        "error",
    )


def test_rows_of_512_bytes_matter_on_a2_and_a3(tmp_path):
    short, whole = dense(tmp_path / "s.onnx", 128, 256), dense(tmp_path / "w.onnx", 256, 512)
    for device in ("A2", "A3"):
        assert "rows of 256 bytes" in one(check_onnx(short, device), "row-bytes").message
        assert "row-bytes" not in rules(check_onnx(whole, device))
    assert "row-bytes" not in rules(check_onnx(short, "310P"))


def four_two(n_in, n_out, dtype=np.float32):
    """(in, out) with two zeros among every four input channels."""
    weight = np.ones((n_in, n_out), dtype)
    weight[0::4] = weight[2::4] = 0
    return weight


def test_4_2_along_input_channels(tmp_path):
    legal = dense(tmp_path / "l.onnx", 32, 32, weight=four_two(32, 32))
    found = check_onnx(legal, "A2")
    assert "--sparsity=1" in found.command
    assert any("int8" in f.message for f in found.of("warning") if f.rule == "sparsity")
    quantized = dense(tmp_path / "q.onnx", 32, 32, weight=four_two(32, 32, np.int8), kind=TensorProto.INT8)
    found = check_onnx(quantized, "A3")
    assert "--sparsity=1" in found.command
    assert "sparsity" not in rules(found, "warning")
    # The same zeros along the output channels are not what the hardware skips.
    turned = check_onnx(dense(tmp_path / "t.onnx", 32, 32, weight=four_two(32, 32).T.copy()), "A2")
    assert "--sparsity=1" not in turned.command
    assert "only" in one(turned, "sparsity").message
    # The 310P has no such switch.
    elsewhere = check_onnx(legal, "310P")
    assert "--sparsity" not in elsewhere.command
    assert "no use for them" in one(elsewhere, "sparsity").message


def test_4_2_in_convolutions_is_along_their_second_axis(tmp_path):
    weight = np.ones((16, 16, 3, 3), np.float32)
    weight[:, 1::4] = weight[:, 3::4] = 0
    assert "--sparsity=1" in check_onnx(conv(tmp_path / "c.onnx", weight), "A2").command
    grouped = check_onnx(conv(tmp_path / "g.onnx", weight, group=2), "A2")
    assert "--sparsity=1" not in grouped.command
    assert "2 groups" in one(grouped, "sparsity").message


def test_weights_in_another_file(tmp_path):
    weight = four_two(32, 32)
    file = dense(
        tmp_path / "m.onnx", 32, 32, weight=weight, save_as_external_data=True, location="m.bin", size_threshold=0
    )
    found = check_onnx(file, "A2")
    assert one(found, "external-data").severity == "info"
    # The zeros are read from there.
    assert "--sparsity=1" in found.command
    (tmp_path / "m.bin").write_bytes(b"short")
    lost = check_onnx(file, "A2")
    assert one(lost, "external-data").severity == "error"
    assert lost.exit_code == 1
    (tmp_path / "m.bin").unlink()
    assert check_onnx(file, "A2").exit_code == 1


def test_arguments_are_checked_at_the_door(tmp_path):
    file = dense(tmp_path / "m.onnx", 16, 16)
    with pytest.raises(ArgumentError, match="target must be one of"):
        check_onnx(file, "910")
    with pytest.raises(ArgumentError, match="cann must be"):
        check_onnx(file, "A2", "3.0")
    with pytest.raises(ArgumentError, match="precision must be one of 'fp16', 'origin'"):
        check_onnx(file, "A2", precision="fp8")
    assert "--soc_version=Ascend910B4" in check_onnx(file, "A2", soc_version="Ascend910B4").command
