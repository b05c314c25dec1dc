"""Structural pruning of MindSpore cells: right by the zero-mask oracle, honest in both modes, all or nothing."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from slimkit.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    FileFormatError,
    GraphError,
    PlanError,
)
from slimkit.core.prune.plan import PrunePlan
from slimkit_ms.compensate import WholePair
from slimkit_ms.prune import PruneMindSpore, Pruner, load_pruned, save_pruned
from slimkit_ms.signals import input_rows, layer_signals
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops

# Layers that write the hidden width of the transformers: it stays whole where norms over it would break the oracle.
HIDDEN = {"bert": ["*.output", "pooler"], "llama": ["*.o_proj", "*.down"]}


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def count(model):
    return sum(p.size for p in model.trainable_params())


class Fused(nn.Cell):
    """A norm that is one operator, as Ascend has it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(40, 32), nn.Dense(32, 4), ops.RmsNorm(1e-6)
        self.scale = ms.Parameter(ms.Tensor(np.ones(32, np.float32)), name="scale")

    def construct(self, ids):
        return self.head(self.norm(self.embed(ids), self.scale)[0])


def test_a_stream_is_followed_through_the_fused_norm():
    job = PruneMindSpore(Fused(), ms.Tensor(np.zeros((2, 5), np.int32))).set_rotation(True)
    job._solved()
    assert job._stream.norms == ["scale"]


def values(model):
    return {p.name: p.asnumpy().copy() for p in model.get_parameters()}


def pruner(model, x, alignment=1):
    return PruneMindSpore(model, x).set_importance_evaluation_function("l1").set_alignment(alignment)


def zeroed(model, desc):
    """The unpruned model with every dropped index of every parameter set to zero."""
    for p in model.get_parameters():
        index = PrunePlan(desc).indices.get(p.name)
        if index is None or "moving" in p.name:
            continue
        masked = p.asnumpy().copy()
        for axis, kept in enumerate(index):
            if kept is not None:
                gone = np.setdiff1d(np.arange(p.shape[axis]), kept)
                masked[(slice(None),) * axis + (gone,)] = 0
        p.set_data(ms.Tensor(masked))
    return model


@pytest.mark.parametrize("name", ["residual", "inverted", "concat", "grouped", "flat", "unet", "bert", "llama"])
def test_pruned_equals_zeroed(name):
    model, x = zoo_ms.build(name)
    oracle, _ = zoo_ms.build(name)
    before = count(model)
    p = pruner(model, x)
    left, desc = p.analysis(0.6, HIDDEN.get(name, []))
    p.prune_by_desc(desc)
    assert count(model) == left < 0.9 * before
    wanted = zeroed(oracle, desc)(x).asnumpy()
    # float32, sums of up to 300 terms of size one
    np.testing.assert_allclose(model(x).asnumpy(), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["residual", "bert"])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_the_target_is_hit(name, ratio):
    model, x = zoo_ms.build(name)
    before = count(model)
    pruner(model, x, alignment=2).prune(ratio, [-1])
    assert abs(count(model) / before - ratio) <= 0.02


def test_both_modes_give_the_pruned_result_even_after_a_compiled_run():
    model, x = zoo_ms.build("inverted")
    mode = ms.get_context("mode")
    try:
        ms.set_context(mode=ms.GRAPH_MODE)
        old = model(x).asnumpy()
        pruner(model, x).prune(0.5)
        graph = model(x).asnumpy()
        ms.set_context(mode=ms.PYNATIVE_MODE)
        eager = model(x).asnumpy()
    finally:
        ms.set_context(mode=mode)
    assert not np.allclose(graph, old, atol=1e-3)
    np.testing.assert_allclose(graph, eager, atol=1e-6)


def test_attributes_primitives_and_names_tell_the_new_truth():
    model, x = zoo_ms.build("inverted")
    pruner(model, x).prune(0.5)
    width = model.depth[0].weight.shape[0]
    assert width < 64
    assert (model.depth[0].out_channels, model.depth[0].in_channels, model.depth[0].group) == (width, width, width)
    assert model.depth[0].conv2d.attrs["out_channel"] == model.depth[0].conv2d.attrs["group"] == width
    assert model.depth[1].num_features == width
    assert model.fc.in_channels == model.fc.weight.shape[1]
    assert [p.name for p in model.get_parameters()] == [n for n, _ in model.parameters_and_names()]


def test_heads_and_sizes_kept_by_the_code_are_set():
    model, x = zoo_ms.build("bert")
    desc = pruner(model, x).prune(0.6, HIDDEN["bert"])
    attention = model.layers[1].attention
    assert attention.num_heads < 4
    assert attention.all_head_size == attention.query.out_channels == attention.num_heads * 8
    assert desc["attributes"]["layers.1.attention"]["num_heads"] == [4, attention.num_heads]


def test_training_copying_and_checkpoints_go_on(tmp_path):
    model, x = zoo_ms.build("residual")
    pruner(model, x).prune(0.5)
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(twin(x).asnumpy(), model(x).asnumpy())
    model.set_train()
    optimizer = nn.Adam(model.trainable_params(), 1e-2)
    step = ms.value_and_grad(lambda a: ops.mean(ops.square(model(a))), None, model.trainable_params())
    losses = []
    for _ in range(5):
        loss, gradients = step(x)
        optimizer(gradients)
        losses.append(float(loss.asnumpy()))
    assert losses[-1] < losses[0]
    ms.save_checkpoint(model, str(tmp_path / "a.ckpt"))
    missing, _ = ms.load_param_into_net(twin, ms.load_checkpoint(str(tmp_path / "a.ckpt")))
    assert not missing
    np.testing.assert_array_equal(twin.set_train(False)(x).asnumpy(), model.set_train(False)(x).asnumpy())


def test_tied_tables_stay_tied():
    class Tied(nn.Cell):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(9, 8), nn.Dense(8, 8), nn.Dense(8, 9, has_bias=False)
            self.head.weight = self.table.embedding_table

        def construct(self, ids):
            return self.head(ops.relu(self.body(self.table(ids))))

    model, x = zoo_ms.randomise(Tied()), zoo_ms.tokens(2, 3, n=9)
    pruner(model, x).prune(0.5, [])
    assert model.head.weight is model.table.embedding_table
    assert model.head.in_channels == model.table.embedding_size == model.head.weight.shape[1] < 8
    assert model(x).shape == (2, 3, 9)


def test_code_that_folds_heads_into_its_input_is_pruned_a_head_at_a_time():
    model, x = zoo_ms.randomise(zoo_ms.Vit(width=40, heads=5)), zoo_ms.images(2, 3, 16, 16)
    p = pruner(model, x)
    desc = p.prune(0.7, [-1])
    width = model.patch.out_channels
    assert width < 40
    assert width % 8 == 0
    assert {(a.num_heads * a.head_dim, a.qkv.out_channels) for a in model.attentions} == {(width, 3 * width)}
    assert any("a head at a time" in note for note in p.report()["notes"])
    assert desc["attributes"]["attentions.0"]["num_heads"] == [5, width // 8]
    assert np.isfinite(model(x).asnumpy()).all()


def test_sizes_that_are_literals_in_the_code_stay_whole_and_are_named():
    class Literal(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Dense(6, 16), nn.Dense(16, 24), nn.Dense(24, 2)

        def construct(self, x):
            x = ops.relu(self.one(x)).reshape(-1, 16)
            return self.three(ops.relu(self.two(x)))

    model, x = Literal(), zoo_ms.images(2, 6)
    p = pruner(model, x).set_node_reserved_ratio(0.5)
    p.prune(0.5, [])
    assert (model.one.out_channels, model.two.out_channels) == (16, 12)
    assert any("written in the code of Literal" in reason for reason in p.report()["whole"])


def test_analysis_leaves_the_cell_alone():
    model, x = zoo_ms.build("bert")
    objects = [id(p) for p in model.get_parameters()]
    before, attributes = values(model), dict(vars(model.layers[1].attention))
    pruner(model, x).analysis(0.5)
    assert [id(p) for p in model.get_parameters()] == objects
    assert all(np.array_equal(v, before[n]) for n, v in values(model).items())
    assert {k: v for k, v in vars(model.layers[1].attention).items() if isinstance(v, int)} == {
        k: v for k, v in attributes.items() if isinstance(v, int)
    }


def test_a_plan_replays_after_json_with_and_without_an_example():
    make = lambda: zoo_ms.randomise(zoo_ms.Bert(layers=1))
    model, x = make(), zoo_ms.tokens(2, 7)
    desc = json.loads(json.dumps(pruner(model, x).prune(0.6, [-1])))
    wanted = model(x).asnumpy()
    for inputs in (x, None):
        fresh = make()
        assert PruneMindSpore(fresh, inputs).prune_by_desc(desc) is fresh
        np.testing.assert_array_equal(fresh(x).asnumpy(), wanted)


def test_a_foreign_plan_is_refused():
    model, x = zoo_ms.build("flat")
    desc = pruner(model, x).prune(0.6)
    other = zoo_ms.randomise(zoo_ms.Flat(8))
    before = values(other)
    with pytest.raises(PlanError, match=r"features.0.weight"):
        PruneMindSpore(other, x).prune_by_desc(desc)
    assert all(np.array_equal(v, before[n]) for n, v in values(other).items())


def test_a_cell_whose_code_contradicts_a_plan_is_put_back():
    model, x = zoo_ms.build("vit")
    desc = pruner(model, x).prune(0.6, [-1])
    fresh, _ = zoo_ms.build("vit")
    for attention in fresh.attentions:
        attention.head_dim = 16  # code that no longer fits its weights
    before = values(fresh)
    with pytest.raises(GraphError):
        PruneMindSpore(fresh, x).prune_by_desc(desc)
    assert all(np.array_equal(v, before[n]) for n, v in values(fresh).items())
    assert fresh.attentions[0].num_heads == 4


@pytest.mark.parametrize("name", ["l2", "bn_scale", "taylor", "hessian", "activation", "lamp", "random"])
def test_every_importance_runs(name):
    model, x = zoo_ms.build("residual")
    p = PruneMindSpore(model, x).set_alignment(1)
    p.set_importance_evaluation_function(name, calibration=[x, zoo_ms.images(2, 3, 8, 8, seed=1)])
    p.prune(0.7)
    assert np.isfinite(model(x).asnumpy()).all()
    assert all(p.requires_grad for p in model.trainable_params())


def test_taylor_keeps_what_the_loss_needs():
    model = zoo_ms.randomise(nn.SequentialCell(nn.Dense(4, 8), nn.Tanh(), nn.Dense(8, 8), nn.Tanh(), nn.Dense(8, 2)))
    last = model[4].weight.asnumpy().copy()
    last[:, [1, 3, 5, 7]] = 0  # what they read, the loss never sees
    model[4].weight.set_data(ms.Tensor(last))
    x = zoo_ms.images(16, 4)
    p = PruneMindSpore(model, x).set_alignment(1)
    p.set_importance_evaluation_function("taylor", calibration=[x], loss=lambda y, _: ops.mean(ops.square(y)))
    desc = p.set_node_reserved_ratio(0.5).prune(0.6)
    assert PrunePlan(desc).indices["4.weight"][1].tolist() == [0, 2, 4, 6]


def test_saved_and_loaded(tmp_path):
    model, x = zoo_ms.build("llama")
    desc = pruner(model, x).prune(0.7)
    save_pruned(tmp_path / "small", model, desc)
    assert sorted(f.name for f in (tmp_path / "small").iterdir()) == ["model.safetensors", "plan.json"]
    fresh, _ = zoo_ms.build("llama", seed=1)
    assert load_pruned(tmp_path / "small", fresh) is fresh
    np.testing.assert_array_equal(fresh(x).asnumpy(), model(x).asnumpy())


def test_damaged_folders_are_refused(tmp_path):
    model, x = zoo_ms.build("flat")
    unpruned, _ = zoo_ms.build("flat")
    desc = pruner(model, x).prune(0.7)
    with pytest.raises(FileFormatError, match="must be the one that desc pruned"):
        save_pruned(tmp_path / "no", unpruned, desc)
    save_pruned(tmp_path / "small", model, desc)
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = values(unpruned)
    with pytest.raises(FileFormatError):
        load_pruned(tmp_path / "small", unpruned)
    assert all(np.array_equal(v, before[n]) for n, v in values(unpruned).items())


def test_doors_check_their_arguments():
    model, x = zoo_ms.build("flat")
    assert Pruner is PruneMindSpore
    with pytest.raises(ArgumentTypeError, match=r"network must be a mindspore.nn.Cell"):
        PruneMindSpore("net", x)
    with pytest.raises(ArgumentError, match="inputs must be an example"):
        PruneMindSpore(model).prune(0.5)
    for ratio in (0, 1.5):
        with pytest.raises(ArgumentError, match="reserved_ratio"):
            PruneMindSpore(model, x).prune(ratio)
    with pytest.raises(ArgumentError):
        PruneMindSpore(model, x).prune(0.5, ["no_such_layer"])


def test_pruning_again_starts_from_what_is_left():
    model, x = zoo_ms.build("residual")
    p = pruner(model, x)
    p.prune(0.7)
    once = count(model)
    left, desc = p.analysis(0.7)
    assert p.prune(0.7) == desc
    assert count(model) == left < 0.8 * once
    assert np.isfinite(model(x).asnumpy()).all()


def test_macs_can_be_the_budget():
    model, x = zoo_ms.build("residual")
    p = pruner(model, x).set_budget("macs")
    p.prune(0.5, [-1])
    assert abs(p.report()["reached"] - 0.5) <= 0.02
    assert p.report()["budget"] == "macs"


def test_mixed_precision_and_bfloat16_weights_are_cut():
    for to in (ms.float16, ms.bfloat16):
        model = nn.SequentialCell(nn.Dense(6, 16), nn.ReLU(), nn.Dense(16, 16), nn.ReLU(), nn.Dense(16, 3)).to_float(to)
        for p in model.get_parameters():
            p.set_dtype(to)
        pruner(model, zoo_ms.images(2, 6).astype(to)).prune(0.6)
        assert {p.dtype for p in model.get_parameters()} == {to}
        assert model[2].weight.shape[0] < 16


@pytest.mark.parametrize("name", ["flat", "residual"])
def test_compensation_recovers_the_outputs(name):
    """Refitted layers say what their originals said, as far as calibration data tell: the error falls."""
    wanted, x = zoo_ms.build(name)
    data = [zoo_ms.images(16, 3, 8, 8, seed=s) for s in range(4)]
    held_out = zoo_ms.images(16, 3, 8, 8, seed=9)
    errors = []
    for repair in (None, data):
        model = copy.deepcopy(wanted)
        p = pruner(model, x)
        p.set_compensation(repair)
        p.prune(0.6)
        errors.append(float(np.square(model(held_out).asnumpy() - wanted(held_out).asnumpy()).mean()))
        assert ("compensation" in p.report()) == (repair is not None)
    assert errors[1] < 0.7 * errors[0]
    assert set(p.report()["compensation"]["refitted"]) >= {"flat": {"classifier.2"}, "residual": {"a1.0", "fc"}}[name]


def test_what_a_convolution_multiplies_gives_its_output():
    forms = {"pad_mode": "same", "stride": 2}, {"pad_mode": "valid", "dilation": 2}, {"pad_mode": "pad", "padding": 1}
    for form in forms:
        layer, x = zoo_ms.randomise(nn.Conv2d(3, 4, 3, **form)), zoo_ms.images(2, 3, 9, 9)
        made = input_rows(layer, x.asnumpy()) @ layer.weight.asnumpy().reshape(4, -1).T
        wanted = np.moveaxis(layer(x).asnumpy(), 1, -1).reshape(-1, 4)
        np.testing.assert_allclose(made, wanted, atol=1e-5)  # float32, 27 products


@pytest.mark.parametrize("form", ["by name", "by place"])
def test_padding_counts_nowhere_however_masks_are_given(form):
    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.out = nn.Embedding(40, 8), nn.Dense(8, 16), nn.Dense(16, 40)

        def construct(self, input_ids, attention_mask=None):
            return self.out(ops.relu(self.up(self.table(input_ids))))

    net = Net()
    mask = np.ones((2, 6), np.int32)
    mask[1, 4:] = 0
    found = []
    for junk in (20, 30):
        ids = np.where(mask, np.arange(12).reshape(2, 6), junk).astype(np.int32)
        given = ms.Tensor(ids), ms.Tensor(mask)
        batch = given if form == "by place" else dict(zip(("input_ids", "attention_mask"), given))
        found.append(layer_signals(net, [batch], ["up", "out"], None, 0))
        assert [(len(x), len(y)) for x, y in WholePair(net, net, ["up"], [batch]).calls("up")] == [(10, 10)]
    for path, signal in found[0].items():
        assert signal.rows == 10
        assert np.array_equal(signal.gram, found[1][path].gram)
        assert np.array_equal(signal.slope, found[1][path].slope)
