"""A Dense of MindSpore with its own activation keeps it as an int8 layer."""

import numpy as np

import slimkit_ms


def test_a_dense_keeps_its_activation(tmp_path):
    import mindspore as ms
    from mindspore import nn

    net = nn.SequentialCell(nn.Dense(16, 24, activation="relu"))
    batches = [ms.Tensor(np.random.default_rng(0).standard_normal((64, 16)), ms.float32)]
    config = slimkit_ms.SparseConfig(method="hessian", sparse_ratio=0.3, weight_bits=8)
    slimkit_ms.Compressor(net, config).compress(batches)
    before = net(batches[0]).asnumpy()
    slimkit_ms.save_w8a8s(tmp_path, net, batches, {})
    assert slimkit_ms.emulate_w8a8s(net, tmp_path) == ["0"]
    after = net(batches[0]).asnumpy()
    assert after.min() == 0.0
    np.testing.assert_allclose(after, before, atol=0.03 * before.max())
