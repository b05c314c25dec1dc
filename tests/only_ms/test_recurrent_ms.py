"""nn.GRU, nn.LSTM and nn.RNN: their widths are cut, and what stands around them is not kept whole for their sake."""

from __future__ import annotations

import numpy as np
import pytest

import slimkit_ms
from slimkit.core.prune.plan import PrunePlan
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


class Net(nn.Cell):
    """Two convolutions over time in front of a recurrent layer, whose outputs and last state are read."""

    def __init__(self, recurrent, width):
        super().__init__()
        self.c1, self.c2 = nn.Conv1d(4, 12, 3, has_bias=True), nn.Conv1d(12, 10, 3, has_bias=True)
        self.recurrent, self.lstm = recurrent, isinstance(recurrent, nn.LSTM)
        self.head, self.last = nn.Dense(width, 5), nn.Dense(8, 5)

    def construct(self, x):
        y = ops.relu(self.c2(ops.relu(self.c1(x)))).swapaxes(1, 2)
        if not self.recurrent.batch_first:
            y = y.swapaxes(0, 1)
        y, state = self.recurrent(y)
        if self.lstm:
            state = state[0]
        if not self.recurrent.batch_first:
            y = y.swapaxes(0, 1)
        return self.head(y.mean(1)) + self.last(state.mean(0))


KINDS = {
    "gru both ways": lambda: (nn.GRU(10, 8, batch_first=True, bidirectional=True), 16),
    "lstm stacked": lambda: (nn.LSTM(10, 8, 2, batch_first=True), 8),
    "rnn without bias": lambda: (nn.RNN(10, 8, has_bias=False), 8),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_pruned_equals_zeroed(name):
    net, oracle = (zoo_ms.randomise(Net(*KINDS[name]())) for _ in range(2))
    x = zoo_ms.images(2, 4, 5)
    before = sum(p.size for p in net.trainable_params())
    pruner = slimkit_ms.PruneMindSpore(net, x).set_alignment(1)
    left, desc = pruner.analysis(0.5, [])
    assert not pruner.report()["without_rule"]
    pruner.prune_by_desc(desc)
    assert sum(p.size for p in net.trainable_params()) == left < 0.55 * before
    assert net.recurrent.hidden_size == net.last.in_channels < 8
    assert net.c1.out_channels < 12
    assert net.c2.out_channels == net.recurrent.weight_ih_l0.shape[1] < 10
    for p in oracle.get_parameters():
        values = p.asnumpy().copy()
        for axis, kept in enumerate(PrunePlan(desc).indices.get(p.name, ())):
            if kept is not None:
                values[(slice(None),) * axis + (np.setdiff1d(np.arange(p.shape[axis]), kept),)] = 0
        p.set_data(ms.Tensor(values))
    # float32, five steps of sums of up to 36 products
    np.testing.assert_allclose(net(x).asnumpy(), oracle(x).asnumpy(), atol=2e-5)


def test_training_goes_on_and_a_folder_loads(tmp_path):
    net, x = zoo_ms.randomise(Net(*KINDS["gru both ways"]())), zoo_ms.images(2, 4, 5)
    before = net(x).asnumpy()
    desc = slimkit_ms.PruneMindSpore(net, x).set_alignment(1).prune(0.6, [])
    assert {id(p) for p in net.recurrent.w_ih_list} <= {id(p) for p in net.get_parameters()}
    slimkit_ms.save_pruned(str(tmp_path / "small"), net, desc)
    fresh = slimkit_ms.load_pruned(str(tmp_path / "small"), Net(*KINDS["gru both ways"]()))
    np.testing.assert_array_equal(fresh(x).asnumpy(), net(x).asnumpy())
    step = nn.TrainOneStepCell(nn.WithLossCell(fresh, nn.MSELoss()), nn.Adam(fresh.trainable_params(), 1e-2))
    losses = [float(step(x, ms.Tensor(before)).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_a_plan_that_is_only_looked_at_changes_nothing():
    net, x = zoo_ms.randomise(Net(*KINDS["lstm stacked"]())), zoo_ms.images(2, 4, 5)
    before, held = net(x).asnumpy(), [id(p) for p in net.recurrent.w_hh_list]
    slimkit_ms.PruneMindSpore(net, x).set_alignment(1).analysis(0.5, [])
    assert [id(p) for p in net.recurrent.w_hh_list] == held
    assert (type(net.recurrent), net.recurrent.hidden_size) == (nn.LSTM, 8)
    np.testing.assert_array_equal(net(x).asnumpy(), before)


class Steps(nn.Cell):
    """A cell that is called step by step, its state begun with a size written in the code."""

    def __init__(self, cell):
        super().__init__()
        self.into, self.cell, self.head = nn.Dense(6, 12), cell, nn.Dense(8, 3)
        self.lstm = isinstance(cell, nn.LSTMCell)

    def construct(self, x):
        state = ops.zeros((2, 8), ms.float32)
        memory, y = state, self.into(x)
        for t in range(2):
            if self.lstm:
                state, memory = self.cell(y[:, t], (state, memory))
            else:
                state = self.cell(y[:, t], state)
        return self.head(state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_what_the_code_holds_fast_keeps_nothing_else_whole(kind):
    net, x = zoo_ms.randomise(Steps(kind(12, 8))), zoo_ms.images(2, 2, 6)
    pruner = slimkit_ms.PruneMindSpore(net, x).set_alignment(1)
    pruner.prune(0.6, [])
    assert net.into.out_channels == net.cell.input_size == net.cell.weight_ih.shape[1] < 12
    assert net.cell.hidden_size == net.head.in_channels == 8
    held = next(places for why, places in pruner.report()["whole"].items() if "code of Steps" in why)
    assert "head.weight:1" in held
    assert "into.weight:0" not in held
    assert net(x).shape == (2, 3)
