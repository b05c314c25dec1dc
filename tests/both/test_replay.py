"""Batches are replayed as if each were the first: whatever a forward fills has no say, and is as it was afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.replay import fresh
from slimkit.core.sparse import SparseConfig
from tests.both.test_distill import output, term

WIDTH = 8
KINDS = ["buffer", "number", "tensor", "list", "dict", "object", "input"]


class _Memory:
    """A cache of the kind that libraries keep: an object that holds lists of tensors."""

    def __init__(self):
        self.rows = []


def net(kit, kind):
    """A block that reads and fills state of some kind; with `twin:KIND` one that computes what its first forward does.

    Counters stand at one in the first forward; everything else holds nothing yet.
    """

    class Block(kit.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = kit.linear(WIDTH, WIDTH), kit.linear(WIDTH, WIDTH)
            self.act = kit.relu()
            if kind == "buffer" and kit.name == "torch":
                self.register_buffer("state", kit.tensor(np.zeros(1, np.float32)))
            elif kind == "buffer":  # what MindSpore has instead
                self.state = kit.ms.Parameter(kit.tensor(np.zeros(1, np.float32)), requires_grad=False)
            else:
                empty = {"number": 0.0, "tensor": kit.tensor(np.zeros((1, WIDTH), np.float32)), "list": [], "dict": {}}
                self.state = _Memory() if kind == "object" else empty.get(kind)

        def forward(self, x):
            if kind == "buffer":
                one = kit.tensor(np.ones(1, np.float32))
                self.state.add_(one) if kit.name == "torch" else kit.ms.ops.assign_add(self.state, one)
                x = x + self.state
            elif kind == "number":
                self.state = self.state + 1.0
                x = x + self.state
            elif kind == "tensor":
                x, self.state = x + self.state, x[:1] * 1.0
            elif kind in ("list", "object"):
                rows = self.state if kind == "list" else self.state.rows
                rows.append(x[:1] * 1.0)
                x = x + sum(rows[:-1], 0.0)
            elif kind == "dict":
                before = self.state.get("last", 0.0)
                self.state["last"] = x[:1] * 1.0
                x = x + before
            elif kind == "input":
                x.copy_(x + 1.0)  # in the memory of what was given
            elif kind in ("twin:buffer", "twin:number", "twin:input"):
                x = x + 1.0
            return self.last(self.act(self.first(x))) + x

        construct = forward

    return kit.fill(Block())


def data(kit, n=4):
    rng = np.random.default_rng(3)
    return [kit.tensor(rng.standard_normal((24, WIDTH)).astype(np.float32)) for _ in range(n)]


def state(kit, model):
    found = model.state.rows if isinstance(model.state, _Memory) else model.state
    return repr(found) if found is None or isinstance(found, (float, list, dict)) else kit.array(found).tolist()


def weights(kit, model):
    return {n: v for n, v in kit.values(model).items() if n.startswith(("first", "last"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["wanda", "par"])
def test_sparsity_sees_every_batch_as_the_first(kit, kind, method):
    model, twin = net(kit, kind), net(kit, f"twin:{kind}")
    for name, value in weights(kit, model).items():
        kit.assign(kit.params(twin)[name], value)
    before, batches = state(kit, model), data(kit)
    report = kit.slim.Compressor(model, SparseConfig(method=method)).compress(batches)
    kit.slim.Compressor(twin, SparseConfig(method=method)).compress(data(kit))
    assert report["fallbacks"] == {}
    assert state(kit, model) == before
    for name, value in weights(kit, twin).items():
        np.testing.assert_array_equal(weights(kit, model)[name], value)
    for batch, same in zip(batches, data(kit)):
        np.testing.assert_array_equal(kit.array(batch), kit.array(same))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_a_teachers_answers_come_from_every_batch_as_the_first(kit, kind, tmp_path):
    model, twin = net(kit, kind), net(kit, f"twin:{kind}")
    for name, value in weights(kit, model).items():
        kit.assign(kit.params(twin)[name], value)
    before = state(kit, model)
    found, wanted = (kit.slim.measure_activations(m, data(kit)) for m in (model, twin))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    config = KnowledgeDistillConfig().add_output_soft_label(output(term("HiddenMse")))
    for name, teacher in (("own", model), ("twin", twin)):
        kit.slim.TeacherCache.build(teacher, data(kit), config, tmp_path / name)
    rows = [
        [kit.slim.TeacherCache(tmp_path / name).lookup((batch,), {}) for batch in data(kit)] for name in ("own", "twin")
    ]
    assert repr(rows[0]) == repr(rows[1])
    assert state(kit, model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_each_forward_of_a_replay_begins_from_the_same_state(kit, kind):
    model, (one, other) = net(kit, kind), data(kit, 2)
    with kit.room("replay").replaying(model) as run:
        found = [kit.array(run(batch)) for batch in (one, other, one)]
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_a_block_that_writes_into_its_input_is_not_thought_idle(kit):
    """Influence compares what enters a block with what leaves it; in place, both would be one tensor."""

    class Block(kit.Module):
        def __init__(self, scale):
            super().__init__()
            self.fc = kit.linear(WIDTH, WIDTH)
            self.scale = scale

        def forward(self, x):
            x.copy_(x + self.fc(x) * self.scale)
            return x

        construct = forward

    blocks = [Block(scale) for scale in (1.0, 0.01, 3.0)]
    model = kit.fill(kit.sequential(*blocks))
    assert kit.slim.suggest_layer_map(model, data(kit), keep=2).layer_id_map == {0: 0, 1: 2}


@pytest.mark.parametrize("residual", [False, True])
def test_blocks_that_add_in_place_are_calibrated_like_those_that_do_not(kit, residual):
    """Also where two blocks are handed one tensor, written into in between."""

    class Block(kit.Module):
        def __init__(self, in_place):
            super().__init__()
            self.up, self.act, self.down = kit.linear(WIDTH, WIDTH + 4), kit.relu(), kit.linear(WIDTH + 4, WIDTH)
            self.in_place = in_place

        def forward(self, x):
            y = x + self.down(self.act(self.up(x)))
            if self.in_place:
                x.copy_(y)
                return x
            return y

        construct = forward

    class Net(kit.Module):
        def __init__(self, in_place):
            super().__init__()
            parts = [Block(in_place) for _ in range(3)]
            self.blocks = kit.torch.nn.ModuleList(parts) if kit.name == "torch" else kit.ms.nn.CellList(parts)

        def forward(self, x):
            x = x * 1.0
            for block in self.blocks:
                x = block(x)
            return x

        construct = forward

    found = []
    for in_place in (False, True):
        model = kit.fill(Net(in_place))
        kit.slim.Compressor(model, SparseConfig(method="par", residual=residual)).compress(data(kit))
        found.append(kit.values(model))
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)


def test_a_copy_of_a_call_shares_nothing_that_a_call_may_change(kit):
    x, memory = data(kit, 1)[0], _Memory()
    memory.rows.append(x)
    args, kwargs = fresh(((x, [x]), {"cache": memory, "n": 3}), kit.room("replay").TENSORS)
    assert args[0] is args[1][0] is kwargs["cache"].rows[0]  # one object stays one
    assert args[0] is not x
    assert kwargs["cache"] is not memory
    assert kwargs["n"] == 3
