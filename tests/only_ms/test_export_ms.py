"""MINDIR files reload and answer like the cell they came from."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit_ms import export_mindir, export_onnx

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
    with pytest.raises(ValueError, match="fixed shapes"):
        export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []
