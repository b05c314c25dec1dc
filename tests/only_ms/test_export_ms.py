"""MINDIR files reload and answer like the cell they came from."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from slimkit.core import onnxfile
from slimkit.core.errors import UnsupportedError
from slimkit_ms import apply_delta, export_mindir, export_onnx
from tests.zoo_ms import build, images, randomise

import mindspore as ms
from mindspore import nn


def test_mindir_reloads_with_equal_outputs(tmp_path):
    net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
    x = ms.Tensor(np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
    report = export_mindir(net, x, tmp_path / "net.mindir")
    assert report.max_difference <= 1e-6
    assert (tmp_path / "net.mindir").stat().st_size == report.file_bytes
    again = nn.GraphCell(ms.load(str(tmp_path / "net.mindir")))(x)
    np.testing.assert_allclose(again.asnumpy(), net(x).asnumpy(), atol=1e-6)


def test_refusals_write_nothing(tmp_path):
    net = nn.Dense(4, 2)
    x = ms.ops.ones((1, 4))
    with pytest.raises(ValueError, match="mindir"):
        export_mindir(net, x, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="no input"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic={2: "width"})
    with pytest.raises(UnsupportedError, match=r"does not run with width 2.*leave that axis"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic={1: "width"})
    assert list(tmp_path.iterdir()) == []


def test_an_open_batch_size_takes_other_batches(tmp_path):
    net, x = build("residual")
    report = export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True)
    assert report.open_axes == {"x": {0: "batch"}}
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    assert session.get_outputs()[0].shape[0] == "batch"
    for count in (1, 5):
        more = images(count, 3, 8, 8, seed=count)
        found = session.run(None, {"x": more.asnumpy()})[0]
        np.testing.assert_allclose(found, net(more).asnumpy(), atol=1e-4)  # float32, weights of size 0.3 in ten layers


def test_a_cell_that_writes_its_batch_size_down_is_found_by_the_second_size(tmp_path):
    net, x = build("grouped")
    with pytest.raises(UnsupportedError, match=r"does not run with inputs|differs"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []


def test_onnx_weights_beyond_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxfile, "_LARGEST_BYTES", 1000)
    net = nn.SequentialCell(nn.Dense(16, 64), nn.ReLU(), nn.Dense(64, 8))
    x = images(3, 16)
    report = export_onnx(net, x, tmp_path / "net.onnx")
    assert (report.opset, report.data_file) == (13, "net.onnx.data")
    assert report.max_difference < 1e-5  # float32, 64 terms
    assert (tmp_path / "net.onnx.data").stat().st_size >= 64 * 24 * 4
    assert report.file_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match="external_data=False"):
        export_onnx(net, x, tmp_path / "one.onnx", external_data=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]


def test_a_mindir_beyond_one_file_is_two_pieces_that_load_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(ms.train.serialization, "TOTAL_SAVE", 0)
    net, x = build("residual")
    for _ in range(2):  # the second takes the place of the first
        report = export_mindir(net, x, tmp_path / "out" / "net.mindir")
    assert report.path.endswith("net_graph.mindir")
    assert report.data_folder == "net_variables"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["net_graph.mindir", "net_variables"]
    assert report.file_bytes == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    (tmp_path / "out").rename(tmp_path / "moved")
    again = nn.GraphCell(ms.load(str(tmp_path / "moved" / "net_graph.mindir")))(x)
    np.testing.assert_allclose(again.asnumpy(), net.set_train(False)(x).asnumpy(), atol=1e-5)


def test_mindir_with_loras_merged(tmp_path):
    net, x = randomise(nn.SequentialCell(nn.Dense(6, 5), nn.ReLU(), nn.Dense(5, 3))), images(2, 6)
    apply_delta(net, "lora", targets=["0"], rank=2)
    b = net[0].mindpet_delta_lora_b
    b.set_data(ms.Tensor(np.ones(b.shape, np.float32)))
    wanted = net(x).asnumpy()
    export_mindir(net, x, tmp_path / "merged.mindir", merge_delta=True)
    export_mindir(net, x, tmp_path / "beside.mindir")
    assert (tmp_path / "merged.mindir").stat().st_size < (tmp_path / "beside.mindir").stat().st_size
    found = nn.GraphCell(ms.load(str(tmp_path / "merged.mindir")))(x).asnumpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # float32; the merged product rounds once less
    assert "mindpet_delta_lora_a" in net[0]._params
    np.testing.assert_array_equal(net(x).asnumpy(), wanted)
