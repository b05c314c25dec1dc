"""A layer that carries a delta is the layer it was: whatever replaces its parameters, whatever hangs on it."""

import copy

import numpy as np
import pytest

from slimkit.core.errors import UnsupportedError

LORA = [("lora", {"rank": 2}), ("lora", {"rank": 2, "dora": True}), ("lora", {"rank": 2, "init": "pissa"})]
KINDS = [
    *LORA,
    ("ia3", {"feedforward": ["body"]}),
    ("ia3", {"feedforward": None}),
    ("adapter", {"bottleneck_size": 3}),
    ("low_rank_adapter", {"reduction_factor": 2}),
]
MERGED = ("lora", "ia3")
IDS = [kind + "-" + next(reversed(options)) for kind, options in KINDS]


@pytest.fixture
def net(kit):
    net = kit.named(body=kit.linear(6, 8), act=kit.relu(), head=kit.linear(8, 4))
    kit.train_mode(kit.fill(net), False)
    return net


@pytest.fixture
def x(kit, rng):
    return kit.tensor(rng.standard_normal((5, 6)).astype(np.float32))


def stir(kit, net, seed=1, what="mindpet_delta", scale=0.3):
    rng = np.random.default_rng(seed)
    for name, parameter in kit.params(net).items():
        if what in name:
            noise = rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * scale
            kit.assign(parameter, kit.array(parameter) + noise)


def out(kit, net, x):
    return kit.array(net(x))


def layer_of(net):
    return next(iter(net))


def replace(kit, layer, value):
    """Put another parameter object where the weight was."""
    if kit.name == "torch":
        layer.weight = kit.torch.nn.Parameter(kit.torch.from_numpy(value))
    else:
        layer.weight = kit.ms.Parameter(kit.ms.Tensor(value), name=layer.weight.name)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_the_layer_stays_the_same_object(kit, net, x, kind, options):
    layer, plain = layer_of(net), type(layer_of(net))
    weight, held = layer.weight, set(vars(layer))
    kit.slim.apply_delta(net, kind, ["body"], **options)
    assert layer_of(net) is layer
    assert isinstance(layer, plain)
    assert layer.weight is weight
    kit.slim.remove_delta(net)
    assert layer_of(net) is layer
    assert type(layer) is plain
    assert layer.weight is weight
    assert set(vars(layer)) == held
    assert not any("mindpet" in n for n in kit.params(net))


@pytest.mark.parametrize("leave", ["merge", "remove", "unmerge"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_a_parameter_that_was_replaced_is_the_layers_own(kit, net, x, kind, options, leave):
    kit.slim.apply_delta(net, kind, ["body"], **options)
    stir(kit, net)
    value = np.random.default_rng(5).standard_normal((8, 6)).astype(np.float32)
    replace(kit, layer_of(net), value)
    y = out(kit, net, x)
    if leave == "remove":
        kit.slim.remove_delta(net)
        plain = kit.named(body=kit.linear(6, 8), act=kit.relu(), head=kit.linear(8, 4))
        kit.fill(plain)
        kit.assign(kit.params(plain)["body.weight"], value)
        np.testing.assert_array_equal(out(kit, net, x), out(kit, plain, x))
        return
    if kind not in MERGED:
        return
    kit.slim.merge_delta(net, unload=leave == "merge")
    np.testing.assert_allclose(out(kit, net, x), y, rtol=1e-5, atol=2e-5)  # float32, 8 terms of size 1
    if leave == "unmerge":
        kit.slim.unmerge_delta(net)
        np.testing.assert_array_equal(kit.array(layer_of(net).weight), value)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_hooks_stay_on(kit, net, x, kind, options):
    layer, seen = layer_of(net), []
    layer.register_forward_pre_hook(lambda _layer, args: (args[0] * 2,))
    layer.register_forward_hook(lambda _layer, _args, _out: seen.append(1))
    y = out(kit, net, x)
    kit.slim.apply_delta(net, kind, ["body"], **options)
    # float32 rounding of what cancels exactly in real numbers (DoRA's gain of 1, PiSSA's minuend)
    np.testing.assert_allclose(out(kit, net, x), y, rtol=1e-5, atol=1e-5)
    stir(kit, net)
    y1 = out(kit, net, x)
    assert np.abs(y1 - y).max() > 1e-2
    if kind in MERGED:
        kit.slim.merge_delta(net)
        np.testing.assert_allclose(out(kit, net, x), y1, rtol=1e-4, atol=1e-4)  # float32, inputs twice as large
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y)
    assert len(seen) == (5 if kind in MERGED else 4)


def test_a_copy_is_a_layer_of_its_own(kit, net, x):
    kit.slim.apply_delta(net, "lora", ["body"], rank=2)
    stir(kit, net)
    y = out(kit, net, x)
    twin = copy.deepcopy(net)
    kit.assign(kit.params(net)["body.weight"], np.zeros((8, 6), np.float32))
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, twin, x), y)
    kit.slim.merge_delta(twin, unload=True)
    np.testing.assert_allclose(out(kit, twin, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_without_its_deltas_the_base_runs_alone(kit, net, x, kind, options):
    y = out(kit, net, x)
    kit.slim.apply_delta(net, kind, ["body"], also_train=["head"], **options)
    stir(kit, net)
    stir(kit, net, what="head.")
    y1 = out(kit, net, x)
    assert np.abs(y1 - y).max() > 1e-2
    with kit.slim.disable_delta(net):
        np.testing.assert_array_equal(out(kit, net, x), y)
        assert not any(kit.trains(p) for n, p in kit.params(net).items() if n.startswith("head"))
    np.testing.assert_array_equal(out(kit, net, x), y1)
    assert all(kit.trains(p) for n, p in kit.params(net).items() if n.startswith("head"))
    with pytest.raises(RuntimeError, match="own"), kit.slim.disable_delta(net):
        raise RuntimeError("own")
    np.testing.assert_array_equal(out(kit, net, x), y1)
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y)


def two_heads(kit, net, x):
    """Deltas "a" and "b", each with a head of its own, and what each answers."""
    answers = {}
    for seed, name in enumerate("ab", 1):
        report = kit.slim.apply_delta(net, "lora", ["body"], rank=2, name=name, also_train=["head"])
        if name == "b":
            assert "'a' does not act any more" in report.notes[0]
        stir(kit, net, seed, what="mindpet_delta_lora_b_" + name)
        stir(kit, net, seed, what="head.")
        answers[name] = out(kit, net, x)
    return answers


def test_switching_deltas_switches_their_heads(kit, net, x):
    y = out(kit, net, x)
    answers = two_heads(kit, net, x)
    for name in "aba":
        kit.slim.set_delta(net, name)
        np.testing.assert_array_equal(out(kit, net, x), answers[name])
    with kit.slim.disable_delta(net):
        np.testing.assert_array_equal(out(kit, net, x), y)
    np.testing.assert_array_equal(out(kit, net, x), answers["a"])
    with pytest.raises(UnsupportedError, match=r"'a' and 'b' each have values for head\.weight"):
        kit.slim.set_delta(net, {"a": 0.5, "b": 0.5})
    np.testing.assert_array_equal(out(kit, net, x), answers["a"])
    kit.slim.remove_delta(net, "a")
    kit.slim.set_delta(net, "b")
    np.testing.assert_array_equal(out(kit, net, x), answers["b"])
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y)
    assert all(kit.trains(p) for p in kit.params(net).values())


def test_merging_for_good_keeps_the_head_that_acts(kit, net, x):
    answers = two_heads(kit, net, x)
    kit.slim.set_delta(net, "a")
    kit.slim.merge_delta(net, unload=True)
    np.testing.assert_allclose(out(kit, net, x), answers["a"], rtol=1e-5, atol=1e-5)  # float32, 8 terms


def test_adapters_act_or_do_not(kit, net, x):
    y = out(kit, net, x)
    kit.slim.apply_delta(net, "adapter", ["body"], bottleneck_size=2, name="a")
    kit.slim.apply_delta(net, "lora", ["head"], rank=2, name="b")
    stir(kit, net)
    both = out(kit, net, x)
    kit.slim.set_delta(net, "b")
    alone = out(kit, net, x)
    assert np.abs(alone - both).max() > 1e-3
    assert np.abs(alone - y).max() > 1e-3
    with pytest.raises(UnsupportedError, match="weight must be 0 or 1"):
        kit.slim.set_delta(net, {"a": 0.5})
    np.testing.assert_array_equal(out(kit, net, x), alone)
    kit.slim.set_delta(net, ["a", "b"])
    np.testing.assert_array_equal(out(kit, net, x), both)


def test_a_delta_drops_at_its_own_rate(kit, net, x):
    kit.slim.apply_delta(net, "lora", ["body"], rank=2, name="a", dropout=0.9)
    kit.slim.apply_delta(net, "lora", ["body"], rank=2, name="b")
    stir(kit, net)
    kit.train_mode(net, True)
    assert np.abs(out(kit, net, x) - out(kit, net, x)).max() > 0
    kit.slim.set_delta(net, "b")
    np.testing.assert_array_equal(out(kit, net, x), out(kit, net, x))
    kit.slim.set_delta(net, ["b", "a"])  # in another order as well
    assert np.abs(out(kit, net, x) - out(kit, net, x)).max() > 0
    kit.slim.remove_delta(net, "a")
    np.testing.assert_array_equal(out(kit, net, x), out(kit, net, x))


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_an_embeddings_padding_is_given_the_sum_and_trains_nothing(kit, padding):
    ids = np.array([[0, 3, 1, 0], [2, 3, 3, 1]], np.int32)
    if kit.name == "torch":
        table = kit.torch.nn.Embedding(5, 4, padding_idx=padding)
    else:
        table = kit.ms.nn.Embedding(5, 4, padding_idx=padding)
    net = kit.named(table=table)
    kit.slim.apply_delta(net, "lora", ["table"], rank=2, alpha=2)
    a, b = (kit.params(net)[f"table.mindpet_delta_lora_{s}"] for s in "ab")
    if padding is not None:
        assert not kit.array(a)[:, padding].any()
    assert np.abs(kit.array(a)).sum(0)[[i for i in range(5) if i != padding]].all()
    kit.assign(b, np.ones((4, 2), np.float32))
    kit.assign(a, np.arange(10, dtype=np.float32).reshape(2, 5))
    base = next(v for n, v in kit.values(net).items() if "mindpet" not in n)
    want = (base + (np.ones((4, 2)) @ np.arange(10).reshape(2, 5)).T)[ids]
    np.testing.assert_allclose(out(kit, net, kit.tensor(ids)), want, rtol=1e-6)
    if kit.name == "torch":
        net(kit.tensor(ids)).sum().backward()
        grad = kit.array(a.grad)
    else:
        run = kit.ms.grad(lambda: net(kit.tensor(ids)).sum(), None, kit.ms.ParameterTuple([a, b]))
        grad = kit.array(run()[0])
    counts = np.bincount(ids.ravel(), minlength=5).astype(np.float32)
    if padding is not None:
        counts[padding] = 0
    np.testing.assert_allclose(grad, np.stack([4 * counts, 4 * counts]))  # b is all ones, four outputs
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(out(kit, net, kit.tensor(ids)), want, rtol=1e-6)


def test_all_linear_says_what_it_left_out(kit, net):
    kind = type(kit.linear(2, 2))
    if kit.name == "torch":
        own = type("Own", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    else:
        own = type("Own", (kind,), {"construct": lambda self, x: 2 * kind.construct(self, x)})
    net = kit.named(body=kit.linear(6, 8), own=own(8, 8), head=kit.linear(8, 4))
    report = kit.slim.apply_delta(net, "lora", rank=1)
    assert list(report.layers) == ["body", "head"]
    assert list(report.skipped) == ["own"]
    assert "skipped own: Own is a" in str(report)
    report = kit.slim.apply_delta(net, "lora", rank=1, name="two", exclude=["own"])
    assert not report.skipped


def test_the_output_embedding_is_found_inside_a_holder(kit):
    class Model(kit.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = kit.linear(4, 4), kit.linear(4, 6)

        def get_output_embeddings(self):
            return self.lm_head

    class Holder(kit.Module):
        def __init__(self):
            super().__init__()
            self.inner = kit.named(net=Model())

    for model, path in ((Model(), ""), (Holder(), "inner.net.")):
        report = kit.slim.apply_delta(model, "lora", rank=1)
        assert list(report.layers) == [path + "body"]
        assert "output embedding" in report.skipped[path + "lm_head"]


def test_a_layer_with_a_lora_takes_strategies(kit, net, x):
    kit.slim.apply_delta(net, "lora", ["body"], rank=2, name="other")
    y = out(kit, net, x)
    layer_of(net).shard(
        strategy_org_dense_matmul=((1, 1), (2, 1)), strategy_org_bias_add=((1, 2), (2,)),
        strategy_lora_b_matmul=((1, 1), (2, 1)),
    )  # fmt: skip
    assert layer_of(net).strategies["lora_b_matmul"] == ((1, 1), (2, 1))
    np.testing.assert_array_equal(out(kit, net, x), y)  # recorded, and nothing else
    with pytest.raises(ValueError, match="divide"):
        layer_of(net).shard(strategy_org_dense_matmul=((1, 1), (3, 1)))
