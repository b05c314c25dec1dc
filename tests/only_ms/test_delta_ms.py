"""Deltas in MindSpore's own modes: graphs, half precision, recorded strategies, checkpoints and optimizers."""

import numpy as np
import pytest

import slimkit_ms
from slimkit.core.delta.shard import ShardError

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True)
def device(request):
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


X = ms.Tensor(np.linspace(-1, 1, 30).reshape(5, 6).astype(np.float32))


def build():
    net = nn.SequentialCell(nn.Dense(6, 8, activation="tanh"), nn.Dense(8, 4))
    rng = np.random.default_rng(0)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.4))
    return net.set_train(False)


def stir(net, seed=1):
    rng = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        if "mindpet" in parameter.name:
            noise = rng.standard_normal(parameter.shape).astype(np.float32) * 0.3
            parameter.set_data(ms.Tensor(parameter.asnumpy() + noise))


KINDS = [
    ("lora", {"rank": 2}),
    ("lora", {"rank": 2, "dora": True}),
    ("lora", {"rank": 2, "init": "pissa"}),
    ("lora", {"rank": 2, "keep_zeros": True}),
    ("adapter", {"bottleneck_size": 3}),
    ("low_rank_adapter", {"reduction_factor": 2}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_graph_mode_computes_what_pynative_computes(kind, options):
    net = build()
    slimkit_ms.apply_delta(net, kind, ["*"], strict=False, **options)
    stir(net)
    want = net(X).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(X).asnumpy(), want, rtol=1e-5, atol=1e-6)


class Pictures(nn.Cell):
    """A table of tokens beside a convolution."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(5, 4), nn.Conv2d(3, 4, 3, pad_mode="pad", padding=1)

    def construct(self, ids, pictures):
        return self.conv(pictures).mean((2, 3)) + self.table(ids)


def test_graph_mode_computes_the_other_layers_too():
    net = Pictures().set_train(False)
    batch = ms.Tensor([3, 1], ms.int32), ms.Tensor(np.linspace(-1, 1, 96).reshape(2, 3, 4, 4).astype(np.float32))
    slimkit_ms.apply_delta(net, "lora", ["table", "conv"], rank=2, rslora=True)
    stir(net)
    want = net(*batch).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(net(*batch).asnumpy(), want, rtol=1e-5, atol=1e-6)  # float32, another order of adding


@pytest.mark.parametrize("kind", [ms.float16, ms.float32])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("LoRADense", {"lora_rank": 2, "lora_alpha": 4}),
        ("AdapterDense", {"bottleneck_size": 4}),
        ("LowRankAdapterDense", {"reduction_factor": 2}),
    ],
)
def test_graph_mode_computes_in_the_asked_dtype(layer, options, kind):
    net = getattr(slimkit_ms, layer)(6, 8, compute_dtype=kind, **options).set_train(False)
    stir(net)
    want = net(X).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    found = net(X)
    assert found.dtype == ms.float32  # the input's own
    close = 3e-3 if kind == ms.float16 else 1e-5  # a few roundings (2**-11), which a fused graph does elsewhere
    np.testing.assert_allclose(found.asnumpy(), want, rtol=close, atol=close)


def test_graph_mode_computes_the_layers_without_a_base():
    class Parts(nn.Cell):
        def __init__(self):
            super().__init__()
            self.prompt = slimkit_ms.PromptTuning(3, 4)
            self.encoder = slimkit_ms.PrefixEncoder(2, 1, 2, 2)
            self.loss = slimkit_ms.RDropLoss()

        def construct(self, ids, logits, labels):
            return self.prompt(ids), self.encoder(2), self.loss(logits, labels, 4)

    net = Parts().set_train(False)
    ids, labels = ms.Tensor([[0, 1], [1, 0]], ms.int32), ms.Tensor([1, 1, 0, 0], ms.int32)
    logits = ms.Tensor(np.linspace(-1, 1, 12).reshape(4, 3).astype(np.float32))
    want = net(ids, logits, labels)
    ms.set_context(mode=ms.GRAPH_MODE)
    prompt, encoder, loss = net(ids, logits, labels)
    for one, other in ((prompt, want[0]), (encoder[0], want[1][0]), (loss, want[2])):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_notices_merging_switching_and_removal():
    net = build()
    ms.set_context(mode=ms.GRAPH_MODE)
    y0 = net(X).asnumpy()
    slimkit_ms.apply_delta(net, "lora", rank=2)
    stir(net)
    y1 = net(X).asnumpy()
    assert np.abs(y1 - y0).max() > 1e-2
    slimkit_ms.merge_delta(net)
    np.testing.assert_allclose(net(X).asnumpy(), y1, rtol=1e-5, atol=1e-6)
    slimkit_ms.unmerge_delta(net)
    with slimkit_ms.disable_delta(net):
        np.testing.assert_array_equal(net(X).asnumpy(), y0)
    np.testing.assert_array_equal(net(X).asnumpy(), y1)
    slimkit_ms.remove_delta(net)
    np.testing.assert_array_equal(net(X).asnumpy(), y0)


def test_graphs_around_the_model_notice_too():
    """A cell that holds the model, and a function under ms.jit that calls it, were compiled before the delta came."""
    net, other = build(), build()
    holder = Loss(net)

    @ms.jit
    def function(x):
        return net(x)

    @ms.jit
    def of_another(x):
        return other(x)

    ms.set_context(mode=ms.GRAPH_MODE)
    before = float(holder(X)), function(X).asnumpy()
    kept = of_another(X).asnumpy()
    slimkit_ms.apply_delta(net, "lora", rank=2)
    stir(net)
    for _ in range(2):
        y = net(X).asnumpy()
        np.testing.assert_allclose(float(holder(X)), (y**2).mean(), rtol=1e-5)
        np.testing.assert_allclose(function(X).asnumpy(), y, rtol=1e-5, atol=1e-6)
        slimkit_ms.set_delta(net, {"default": 2.0})
    slimkit_ms.remove_delta(net)
    assert float(holder(X)) == before[0]
    np.testing.assert_array_equal(function(X).asnumpy(), before[1])
    np.testing.assert_array_equal(of_another(X).asnumpy(), kept)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_an_optimizer_trains_the_delta_alone(mode):
    ms.set_context(mode=mode)
    net = build()
    slimkit_ms.apply_delta(net, "lora", rank=2)
    base = {p.name: p.asnumpy().copy() for p in net.get_parameters() if "mindpet" not in p.name}
    names = [p.name for p in net.trainable_params()]
    assert names == [
        "0.mindpet_delta_lora_a",
        "0.mindpet_delta_lora_b",
        "1.mindpet_delta_lora_a",
        "1.mindpet_delta_lora_b",
    ]
    step = nn.TrainOneStepCell(Loss(net), nn.Adam(net.trainable_params(), 0.05))
    losses = [float(step(X)) for _ in range(8)]
    assert losses[-1] < losses[0]
    for parameter in net.get_parameters():
        if parameter.name in base:
            np.testing.assert_array_equal(parameter.asnumpy(), base[parameter.name])


class Loss(nn.Cell):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def construct(self, x):
        return (self.net(x) ** 2).mean()


def test_lora_plus_groups_feed_an_optimizer():
    net = build()
    slimkit_ms.apply_delta(net, "lora", rank=2)
    step = nn.TrainOneStepCell(Loss(net), nn.Adam(slimkit_ms.lora_plus_groups(net, 1e-3, 8.0)))
    first = float(step(X))
    assert float(step(X)) < first


def test_a_mindspore_checkpoint_of_the_trainable_part_goes_round(tmp_path):
    net = build()
    slimkit_ms.apply_delta(net, "lora", rank=2)
    stir(net)
    file = str(tmp_path / "d.ckpt")
    ms.save_checkpoint([{"name": p.name, "data": p} for p in net.trainable_params()], file)
    twin = build()
    slimkit_ms.apply_delta(twin, "lora", rank=2)
    ms.load_param_into_net(twin, ms.load_checkpoint(file))
    np.testing.assert_array_equal(twin(X).asnumpy(), net(X).asnumpy())


def test_names_of_the_base_do_not_change():
    net = build()
    before = [p.name for p in net.get_parameters()]
    slimkit_ms.apply_delta(net, "adapter", bottleneck_size=2)
    assert [p.name for p in net.get_parameters() if "mindpet" not in p.name] == before
    every = [p.name for p in net.get_parameters()]
    assert len(set(every)) == len(every)
    slimkit_ms.remove_delta(net)
    assert [p.name for p in net.get_parameters()] == before


LORA = {
    "strategy_org_dense_matmul": ((2, 1), (4, 1)),
    "strategy_org_bias_add": ((2, 4), (4,)),
    "strategy_lora_dropout": ((2, 1),),
    "strategy_lora_a_matmul": ((2, 1), (1, 1)),
    "strategy_lora_b_matmul": ((2, 1), (4, 1)),
    "strategy_lora_mul": ((2, 4), ()),
    "strategy_lora_add": ((2, 4), (2, 4)),
    "strategy_activation": ((2, 4), (2, 4)),
}


def strategy(primitive):
    return tuple(tuple(cut) for cut in primitive.in_strategy)


def test_lora_dense_records_the_documents_strategies():
    layer = slimkit_ms.LoRADense(8, 16, 8, 16, lora_dropout=0.1, activation="relu")
    assert layer.shard(**LORA) is layer
    assert strategy(layer.matmul) == ((2, 1), (4, 1))
    assert strategy(layer.bias_add) == ((2, 4), (4,))
    assert strategy(layer.lora_a_matmul) == ((2, 1), (1, 1))
    assert strategy(layer.lora_b_matmul) == ((2, 1), (4, 1))
    assert strategy(layer.lora_mul) == ((2, 4), ())
    assert strategy(layer.lora_add) == ((2, 4), (2, 4))
    assert strategy(layer.lora_dropout.dropout) == ((2, 1),)
    assert strategy(layer.activation.relu) == ((2, 4),)
    assert layer.strategies["org_bias_add"] == ((2, 4), (4,))
    assert layer(ms.Tensor(np.ones((2, 8), np.float32))).shape == (2, 16)


DENSE = {
    "strategy_matmul_org": ((2, 4), (1, 4)),
    "strategy_bias_org": ((2, 1), (1,)),
    "strategy_activation_org": ((2, 1),),
}
INNER = {
    "strategy_matmul_down_sampler": ((2, 1), (1, 1)),
    "strategy_bias_down_sampler": ((2, 1), (1,)),
    "strategy_non_linearity": ((2, 1),),
    "strategy_matmul_up_sampler": ((2, 1), (1, 1)),
    "strategy_bias_up_sampler": ((2, 1), (1,)),
    "strategy_residual_add": ((2, 1), (2, 1)),
}
LOW_RANK = {
    "strategy_matmul_down_sampler_weight": ((1, 1), (1, 1)),
    "strategy_matmul_down_sampler_input": ((2, 1), (1, 1)),
    "strategy_bias_down_sampler": ((2, 1), (1,)),
    "strategy_non_linearity": ((2, 1),),
    "strategy_matmul_up_sampler_weight": ((1, 1), (1, 1)),
    "strategy_matmul_up_sampler_input": ((2, 1), (1, 1)),
    "strategy_bias_up_sampler": ((2, 1), (1,)),
    "strategy_residual_add": ((2, 1), (2, 1)),
}


@pytest.mark.parametrize(
    ("layer", "arguments", "strategies"),
    [
        ("AdapterLayer", (16, 4), INNER),
        ("AdapterDense", (8, 16), {**DENSE, **INNER}),
        ("LowRankAdapterLayer", (16, 4), LOW_RANK),
        ("LowRankAdapterDense", (8, 16), {**DENSE, **LOW_RANK}),
    ],
)
def test_the_adapters_record_the_documents_strategies(layer, arguments, strategies):
    made = getattr(slimkit_ms, layer)(*arguments)
    made.shard(**strategies)
    recorded = {name.removeprefix("strategy_") for name in strategies}
    if layer.endswith("Dense"):
        recorded -= {"activation_org"}  # there is no activation in this one
    assert set(made.strategies) == recorded
    assert strategy(made.residual_add if layer.endswith("Layer") else made.adapter.residual_add) == ((2, 1), (2, 1))


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "logsigmoid", "silu", "leakyrelu", "softmin"])
def test_every_primitive_behind_an_activation_is_cut(name):
    layer = slimkit_ms.AdapterLayer(8, 4, non_linearity=name)
    layer.shard(strategy_non_linearity=((2, 1),))
    act = layer.mindpet_delta_adapter_block.cell_list[1]
    found = list(act._primitives.values())
    assert found
    assert all(strategy(p)[0] == (2, 1) for p in found)
    assert layer(ms.Tensor(np.ones((2, 8), np.float32))).shape == (2, 8)


BAD = [
    ({"strategy_org_dense_matmul": ((2, 1),)}, "2 tuples"),
    ({"strategy_org_dense_matmul": ((2, 2), (4, 1))}, "alike"),
    ({"strategy_org_dense_matmul": ((2, 1), (3, 1))}, "divide"),
    ({"strategy_org_bias_add": ((2, 4), (2,))}, "alike"),
    ({"strategy_lora_add": ((2, 4), (2, 4, 1))}, "2 axes"),
    ({"strategy_lora_mul": [[2, 4], []]}, "tuple of tuples"),
    ({"strategy_lora_dropout": ((0, 1),)}, "at least 1"),
    ({"strategy_activation": ((True, 1),)}, "ints"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD)
def test_a_strategy_that_does_not_fit_names_the_layer_and_records_nothing(wrong, words):
    layer = slimkit_ms.LoRADense(8, 16, 8, 16, activation="relu")
    with pytest.raises(ShardError, match=words) as caught:
        layer.shard(**{**LORA, **wrong})
    assert "LoRADense" in str(caught.value)
    assert getattr(layer.matmul, "in_strategy", None) is None


def test_logsoftmax_cannot_be_cut():
    with pytest.raises(ValueError, match="LogSoftmax"):
        slimkit_ms.LoRADense(8, 16, 8, 16, activation="logsoftmax").shard(**LORA)
    with pytest.raises(ValueError, match="LogSoftmax"):
        slimkit_ms.AdapterDense(8, 16, non_linearity="logsoftmax").shard(**DENSE, **INNER)


def test_prefix_encoder_records_its_strategy():
    encoder = slimkit_ms.PrefixEncoder(4, 2, 2, 4, prefix_projection=True, projection_dim=8).shard(2, 2)
    assert strategy(encoder.transpose) == ((2, 1, 1, 1, 1),)
    with pytest.raises(TypeError, match="model_parallel"):
        encoder.shard(2, 0)


class PrefixAttention(nn.Cell):
    """The documents' use of PrefixLayer: keys and values with a prefix in front, in a cell compiled as a graph."""

    def __init__(self):
        super().__init__()
        self.prefix = slimkit_ms.PrefixLayer(4, 2, 1, 6, 5, 7, dropout_rate=0.0)

    def construct(self, x):
        key, value = self.prefix()
        key, value = ops.concat((key, x), 0), ops.concat((value, x), 0)
        return ops.matmul(ops.softmax(ops.matmul(x, key.T), -1), value)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
def test_prefix_layer_trains_inside_a_cell(mode):
    ms.set_context(mode=mode)
    net = PrefixAttention()
    slimkit_ms.freeze_delta(net, "prefixtuning")
    step = nn.TrainOneStepCell(Loss(net), nn.Adam(net.trainable_params(), 0.02))
    before = {p.name: p.asnumpy().copy() for p in net.trainable_params()}
    losses = [float(step(X)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(np.abs(p.asnumpy() - before[p.name]).max() > 0 for p in net.trainable_params())


def test_an_optimizer_of_the_acting_delta_alone_leaves_the_other():
    net = nn.SequentialCell(nn.Dense(8, 8))
    for name in ("one", "two"):
        slimkit_ms.apply_delta(net, "lora", ["0"], rank=2, name=name)
    slimkit_ms.set_delta(net, "two")
    x, other = ops.ones((4, 8)), [p for p in net.get_parameters() if "_one" in p.name]
    for mine, moves in ((net.trainable_params(), True), ([p for p in net.get_parameters() if "_two" in p.name], False)):
        before = [p.asnumpy().copy() for p in other]
        optimizer = nn.Adam(mine, 1e-2, weight_decay=0.1)
        grad = ms.value_and_grad(lambda: (net(x) ** 2).sum(), None, optimizer.parameters)
        for _ in range(2):
            optimizer(grad()[1])
        moved = any(np.abs(p.asnumpy() - held).max() > 0 for p, held in zip(other, before))
        assert moved == moves  # docs/differences.md: MindSpore's gradients are never absent
