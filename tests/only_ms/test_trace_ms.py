"""The MindSpore tracer: operators as they are, shapes as they run, and a cell left as it was."""

from __future__ import annotations

import os

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, GraphError
from slimkit_ms.trace import trace
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def ops_of(graph):
    return [node.op for node in graph.nodes]


class Many(nn.Cell):
    """One of most operators, each returned, so that shapes can be compared."""

    def __init__(self):
        super().__init__()
        self.norm, self.prelu = nn.GroupNorm(2, 8), nn.PReLU(8)
        self.up = nn.Conv2dTranspose(8, 4, 2, stride=2, pad_mode="valid", has_bias=True)
        self.flat, self.shuffle = nn.Conv1d(4, 4, 3), nn.PixelShuffle(2)

    def construct(self, x):
        y = self.prelu(self.norm(x))
        up = self.up(y)
        left, right = ops.chunk(y, 2, axis=1)
        return (
            up,
            self.flat(up.reshape(up.shape[0], 4, -1)),
            self.shuffle(up),
            ops.pad(y, (1, 2, 3, 4)),
            ops.flip(y, (1,)),
            ops.interpolate(y, size=(16, 16), mode="nearest"),
            ops.stack((left, right), axis=1),
            ops.repeat_interleave(left, 2, 1),
            y.var(axis=1, keepdims=True),
            ops.tile(y, (1, 2, 1, 1)),
            ops.tile(ops.mean(y, (2, 3), keep_dims=True), (2, 1, 1, 3, 3)),
            ops.broadcast_to(ops.mean(y, 1, keep_dims=True), (2, 5, 8, 8)),
            y.swapaxes(1, 2),
            ops.softmax(y, axis=-1),
            ops.cumsum(y, 1),
            y[:, ::2, None, 1:3],
            y[0],
            y[..., -3],
            ops.logsumexp(y, 1),
            ops.max(y, axis=1)[0],
            ops.unstack(y, 1)[3],
            ops.max_pool2d(y, 2, 2),
            ops.avg_pool2d(y, 2, 2),
            ops.adaptive_avg_pool2d(y, 2),
            ops.matmul(y, y.swapaxes(2, 3)),
            ops.zeros_like(y) + y,
        )


def test_shapes_are_those_that_run():
    model, x = Many(), zoo_ms.images(2, 8, 8, 8)
    graph = trace(model, x)
    made = [graph.values[n].shape for n in graph.outputs]
    assert made == [tuple(y.shape) for y in model(x)]
    assert "opaque" not in ops_of(graph), [n.attrs for n in graph.nodes if n.op == "opaque"]
    assert {"group_norm", "conv", "pad", "along", "pool", "split", "stack", "expand", "repeat", "slice"} <= set(
        ops_of(graph)
    )


def test_a_dense_layer_is_one_product_with_its_bias():
    graph = trace(nn.SequentialCell(nn.Dense(3, 4), nn.ReLU()), zoo_ms.images(2, 3))
    assert ops_of(graph) == ["linear", "elementwise"]
    assert [graph.values[i].path for i in graph.nodes[0].inputs[1:]] == ["0.weight", "0.bias"]
    assert graph.layers == ["0"]


def test_running_statistics_are_buffers():
    graph = trace(nn.SequentialCell(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), zoo_ms.images(1, 3, 4, 4))
    assert graph.buffers == {"1.moving_mean", "1.moving_variance"}
    assert ops_of(graph) == ["conv", "norm"]


def test_shared_parameters_come_once():
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Dense(4, 9, has_bias=False)
            self.head.weight = self.table.embedding_table

        def construct(self, ids):
            return self.head(self.table(ids))

    graph = trace(Tied(), zoo_ms.tokens(2, 3, n=9))
    assert graph.aliases == {"head.weight": "table.embedding_table"}
    assert sum(value.kind == "param" for value in graph.values) == 1


def test_each_instance_of_a_class_gets_its_own_scope():
    graph = trace(*zoo_ms.build("bert"))
    for layer in (0, 1):
        scopes = {node.scope for node in graph.nodes if node.op == "along"}
        assert f"layers.{layer}.attention" in scopes


def test_branches_are_opaque_and_keep_their_parameters_whole():
    class Branch(nn.Cell):
        def __init__(self):
            super().__init__()
            self.yes, self.no, self.last = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 4)

        def construct(self, x):
            x = self.yes(x) if x.sum() > 0 else self.no(x)
            return self.last(x)

    graph = trace(Branch(), zoo_ms.images(2, 4))
    touched = {
        graph.values[i].path for node in graph.nodes if node.op == "opaque" for i in node.inputs if i is not None
    }
    assert {"yes.weight", "yes.bias", "no.weight", "no.bias"} <= touched
    assert "last.weight" not in touched


def test_an_operator_without_a_rule_is_named():
    class Top(nn.Cell):
        def construct(self, x):
            return ops.topk(x, 2)[0]

    graph = trace(Top(), zoo_ms.images(2, 4))
    assert [node.attrs["fn"] for node in graph.nodes if node.op == "opaque"] == ["TopK"]


def test_fused_attention_unfolds_its_heads():
    class Fused(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fa = ops.operations.nn_ops.FlashAttentionScore(4)

        def construct(self, x):
            return self.fa(x, x, x, None, None, None, None, None)[3]

    graph = trace(Fused(), ms.Tensor(np.ones((2, 8, 64), np.float16)))
    node = next(n for n in graph.nodes if n.op == "attention")
    assert graph.values[node.inputs[0]].shape == (2, 4, 8, 16)
    assert graph.values[graph.outputs[0]].shape == (2, 8, 64)


def test_keyword_inputs_and_defaults():
    class Two(nn.Cell):
        def construct(self, x, scale=2.0, y=None):
            return x * scale if y is None else x * scale + y

    graph = trace(Two(), {"x": zoo_ms.images(2, 3), "y": zoo_ms.images(2, 3)})
    assert [v.kind for v in graph.values].count("input") == 2
    with pytest.raises(GraphError, match="do not fit"):
        trace(Two(), {"z": zoo_ms.images(2, 3)})


def test_a_cell_is_left_as_it_was():
    model, x = zoo_ms.build("residual")
    model.set_train(True)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    level = ms.get_context("jit_syntax_level")
    trace(model, x)
    assert model.training
    assert model.a1[1].training
    assert model.phase == "train"
    assert not model.compile_cache
    assert ms.get_context("jit_syntax_level") == level
    after = {p.name: p.asnumpy() for p in model.get_parameters()}
    assert list(after) == list(before)
    assert all(np.array_equal(after[n], v) for n, v in before.items())


def test_equal_names_are_no_obstacle_and_stay():
    model = nn.SequentialCell(nn.Dense(3, 4), nn.Dense(4, 2))
    for p in model.get_parameters():
        p.name = p.name.rpartition(".")[2]
    graph = trace(model, zoo_ms.images(1, 3))
    assert set(graph.shapes) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert [p.name for _, cell in model.cells_and_names() for p in cell._params.values()] == ["weight", "bias"] * 2


def test_code_that_does_not_compile_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Wrong(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fc = nn.Dense(4, 4)

        def construct(self, x):
            return self.fc(x).reshape(-1, 3)

    model = Wrong()
    with pytest.raises(GraphError, match=r"Wrong.construct"):
        trace(model, zoo_ms.images(2, 4))
    assert not model.compile_cache
    assert os.listdir(tmp_path) == []  # MindSpore would leave its analysis in the working folder


def test_inputs_are_needed():
    with pytest.raises(ArgumentError, match="inputs must be an example"):
        trace(nn.Dense(2, 2), None)
    with pytest.raises(ArgumentTypeError, match=r"mindspore.nn.Cell"):
        trace("net", zoo_ms.images(1, 2))


def test_loops_compiled_cells_and_recomputation_are_traced():
    class Loop(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Dense(8, 16), nn.Dense(16, 16), nn.Dense(16, 3)

        def construct(self, x):
            x, i = self.a(x), ops.zeros((), ms.int32)
            while i < 3:
                x, i = ops.relu(self.b(x)), i + 1
            return self.c(x)

    class Compiled(Loop):
        @ms.jit
        def construct(self, x):
            return self.c(ops.relu(self.b(ops.relu(self.a(x)))))

    x = zoo_ms.images(2, 8)
    loop = trace(Loop(), x)
    assert {node.attrs["fn"] for node in loop.nodes if node.op == "opaque"} >= {"a branch or a loop"}
    assert "b.weight" in {
        loop.values[i].path for n in loop.nodes if n.op == "opaque" for i in n.inputs if i is not None
    }
    compiled = Compiled()
    compiled.b.recompute()
    compiled(x)
    assert ops_of(trace(compiled, x)) == ["linear", "elementwise", "linear", "elementwise", "linear"]


def test_a_primitive_without_a_rule_can_be_given_one():
    from slimkit.core.prune.custom import CUSTOM
    from slimkit_ms import PruneMindSpore, register_operator_rule

    class Bessel(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.op = nn.Dense(8, 64), nn.Dense(64, 4), ms.ops.BesselI0e()

        def construct(self, x):
            return self.b(self.op(self.a(x)))

    net, x = Bessel(), zoo_ms.images(3, 8)
    job = PruneMindSpore(net, x).set_alignment(8)
    assert job.analysis(0.5, [])[0] == job.report()["params"]
    assert job.report()["without_rule"] == ["BesselI0e in the model"]
    register_operator_rule(ms.ops.BesselI0e, "elementwise")
    try:
        job = PruneMindSpore(net, x).set_alignment(8)
        assert job.analysis(0.5, [])[0] < 0.6 * job.report()["params"]
    finally:
        register_operator_rule("BesselI0e", None)
    assert not CUSTOM
