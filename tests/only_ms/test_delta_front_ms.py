"""Prefixes and prompts on unedited MindSpore models in graph mode, and on MindSpore's own attention cell."""

import numpy as np
import pytest

import slimkit_ms
from slimkit.core.errors import UnsupportedError
from tests import attention_twins as twins
from tests import kits

import mindspore as ms
from mindspore import nn


@pytest.fixture
def kit():
    kit = kits.make("mindspore")
    yield kit
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_graph_computes_what_pynative_computes_and_forgets_it(kit, kind):
    net, batch = twins.build(kit), twins.batch(kit)
    y0 = net(*batch).asnumpy()
    options = {"prefix_token_num": 2, "inputs": batch} if kind == "prefix" else {"num_virtual_tokens": 2}
    slimkit_ms.apply_delta(net, kind, **options)
    want = net(*batch).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(*batch).asnumpy(), want, atol=1e-6)  # the same operators, fused or not

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.net = net

        def construct(self, ids, mask):
            return (self.net(ids, mask) ** 2).mean()

    step = nn.TrainOneStepCell(Loss(), nn.Adam(net.trainable_params(), 0.05)).set_train()
    before = [p.asnumpy().copy() for p in net.trainable_params()]
    losses = [float(step(*batch).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(not np.array_equal(p.asnumpy(), old) for p, old in zip(net.trainable_params(), before))
    slimkit_ms.remove_delta(net)
    net.set_train(False)
    np.testing.assert_allclose(net(*batch).asnumpy(), y0, atol=1e-6)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_array_equal(net(*batch).asnumpy(), y0)


class Library(nn.Cell):
    """MindSpore's own attention."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def construct(self, x, mask, padding):
        return self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding)[0]


def test_multihead_attention_with_no_weight_on_the_prefix_is_what_it_was(kit):
    """Keys far from every query leave the outputs, masks included, as they were."""
    net = kit.fill(Library()).set_train(False)
    x = kit.tensor(np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32))
    mask = ms.Tensor(np.triu(np.ones((4, 4), bool), 1))
    padding = ms.Tensor(np.array([[False] * 4, [False, False, True, True]]))
    y0 = net(x, mask, padding).asnumpy()
    slimkit_ms.apply_delta(net, "prefix", prefix_token_num=2, inputs=(x, mask, padding))
    rows = dict(net.parameters_and_names())
    y1 = net(x, mask, padding).asnumpy()
    assert np.abs(y1 - y0).max() > 1e-3
    # A prefix of zero keys has score 0 and the value 0: it only takes weight away, evenly from all values.
    for part in ("key", "value"):
        parameter = rows[f"attention.mindpet_delta_prefixtuning.{part}"]
        parameter.set_data(ms.Tensor(np.zeros(parameter.shape, np.float32)))
    assert np.abs(net(x, mask, padding).asnumpy() - y0).max() > 1e-4
    slimkit_ms.remove_delta(net)
    np.testing.assert_array_equal(net(x, mask, padding).asnumpy(), y0)


def test_multihead_attention_with_extra_rows_is_refused(kit):
    net = Library(add_zero_attn=True)
    with pytest.raises(UnsupportedError, match="add_zero_attn"):
        slimkit_ms.apply_delta(net, "prefix", inputs=(kit.tensor(np.ones((1, 2, 8), np.float32)), None, None))
