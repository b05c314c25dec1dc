"""Putting deltas on a model, choosing, merging and taking them off, in both frameworks."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.delta import spec as rules
from slimkit.core.errors import PatternError, UnsupportedError


@pytest.fixture
def net(kit):
    net = kit.named(
        embed=kit.linear(6, 8),
        body=kit.named(query=kit.linear(8, 8), act=kit.relu(), value=kit.linear(8, 8), norm=kit.layer_norm(8)),
        head=kit.linear(8, 3),
    )
    kit.train_mode(kit.fill(net), False)
    return net


@pytest.fixture
def x(kit, rng):
    return kit.tensor(rng.standard_normal((5, 6)).astype(np.float32))


def snapshot(kit, net):
    return {n: (kit.array(p), kit.trains(p)) for n, p in kit.params(net).items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n][0], b[n][0]) and a[n][1] == b[n][1] for n in a)


def stir(kit, net, seed=1, what="mindpet_delta", scale=0.3):
    """Give the delta's parameters values, as training would."""
    rng = np.random.default_rng(seed)
    for name, parameter in kit.params(net).items():
        if what in name:
            noise = rng.standard_normal(tuple(parameter.shape)).astype(np.float32) * scale
            kit.assign(parameter, kit.array(parameter) + noise)


def out(kit, net, x):
    return kit.array(net(x))


def step(kit, net, x, lr=0.05):
    """One plain gradient step of sum(out ** 2) on what trains; gives the loss and the gradients by name."""
    if kit.name == "torch":
        net.zero_grad()
        loss = (net(x) ** 2).sum()
        loss.backward()
        grads = {n: kit.array(p.grad) for n, p in net.named_parameters() if p.requires_grad}
    else:
        params = net.trainable_params()
        loss, found = kit.ms.value_and_grad(lambda: (net(x) ** 2).sum(), None, kit.ms.ParameterTuple(params))()
        grads = {p.name: kit.array(g) for p, g in zip(params, found)}
    for name, parameter in kit.params(net).items():
        if name in grads:
            kit.assign(parameter, kit.array(parameter) - lr * grads[name])
    return float(kit.array(loss)), grads


KINDS = [
    ("lora", {"rank": 2, "alpha": 4}),
    ("lora", {"rank": 2, "rslora": True}),
    ("lora", {"rank": 2, "dora": True}),
    ("lora", {"rank": 2, "init": "pissa"}),
    ("lora", {"rank": 2, "init": "gaussian"}),
    ("lora", {"rank": 2, "keep_zeros": True}),
    ("adapter", {"bottleneck_size": 3}),
    ("low_rank_adapter", {"reduction_factor": 2}),
]
IDS = [kind + "-" + next(reversed(options)) for kind, options in KINDS]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_apply_changes_nothing_trains_alone_and_comes_off_bit_for_bit(kit, net, x, kind, options):
    before, y0 = snapshot(kit, net), out(kit, net, x)
    report = kit.slim.apply_delta(net, kind, targets=["*query", "*value"], **options)
    assert list(report.layers) == ["body.query", "body.value"]
    # float32 rounding of what cancels exactly in real numbers (DoRA's gain of 1, PiSSA's minuend)
    np.testing.assert_allclose(out(kit, net, x), y0, rtol=1e-5, atol=1e-5)
    names = {n for n, p in kit.params(net).items() if kit.trains(p)}
    assert names
    assert all("mindpet_delta" in n for n in names)
    first, _ = step(kit, net, x, lr=1e-3)
    last, grads = step(kit, net, x, lr=1e-3)
    assert last < first
    assert set(grads) == names
    assert all(np.abs(g).max() > 0 for g in grads.values())  # at the second step every factor has something to say
    assert np.abs(out(kit, net, x) - y0).max() > 1e-5
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), before)
    np.testing.assert_array_equal(out(kit, net, x), y0)


@pytest.mark.parametrize(("kind", "options"), KINDS[:6], ids=IDS[:6])
def test_merging_keeps_the_outputs_and_unmerging_the_bits(kit, net, x, kind, options):
    before = snapshot(kit, net)
    kit.slim.apply_delta(net, kind, targets=["body.query", "head"], **options)
    stir(kit, net)
    y1 = out(kit, net, x)
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(out(kit, net, x), y1, rtol=1e-5, atol=1e-5)  # float32, 8 terms
    with pytest.raises(ValueError, match="merged already"):
        kit.slim.merge_delta(net)
    with pytest.raises(ValueError, match="merged"):
        kit.slim.set_delta(net, "default")
    with pytest.raises(ValueError, match="merged"):
        kit.slim.apply_delta(net, "lora", ["body.query"], rank=1, name="two")
    kit.slim.unmerge_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y1)
    with pytest.raises(ValueError, match="not merged"):
        kit.slim.unmerge_delta(net)
    kit.slim.merge_delta(net)
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), before)


def test_merge_and_unload_leaves_plain_layers(kit, net, x):
    types = {type(m).__name__ for m in (net[0],)}
    kit.slim.apply_delta(net, "lora", rank=2)
    stir(kit, net)
    y1 = out(kit, net, x)
    kit.slim.merge_delta(net, unload=True)
    assert not any("mindpet_delta" in n for n in kit.params(net))
    assert type(net[0]).__name__ in types
    np.testing.assert_allclose(out(kit, net, x), y1, rtol=1e-5, atol=1e-5)
    assert all(kit.trains(p) for p in kit.params(net).values())
    with pytest.raises(ValueError, match="no delta"):
        kit.slim.merge_delta(net)


def test_adapters_cannot_be_merged_and_say_so(kit, net, x):
    kit.slim.apply_delta(net, "adapter", ["body.query"], bottleneck_size=2)
    stir(kit, net)
    y1 = out(kit, net, x)
    with pytest.raises(UnsupportedError, match="adapter"):
        kit.slim.merge_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y1)


def test_several_named_deltas_switch_and_combine(kit, net, x):
    y0 = out(kit, net, x)
    alone = {}
    for seed, name in enumerate(("formal", "brief"), 1):
        kit.slim.apply_delta(net, "lora", ["body.query"], rank=2, name=name)
        stir(kit, net, seed, what=f"_{name}")
        kit.slim.set_delta(net, name)
        alone[name] = out(kit, net, x)
    assert np.abs(alone["formal"] - alone["brief"]).max() > 1e-3
    kit.slim.set_delta(net, "formal")
    np.testing.assert_array_equal(out(kit, net, x), alone["formal"])
    assert kit.slim.set_delta(net, {"formal": 0.0, "brief": 1}) == {"formal": 0.0, "brief": 1.0}
    np.testing.assert_array_equal(out(kit, net, x), alone["brief"])
    kit.slim.set_delta(net, {"formal": 0.7, "brief": 0.3})
    mixed = out(kit, net, x)
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(out(kit, net, x), mixed, rtol=1e-5, atol=1e-5)
    kit.slim.unmerge_delta(net)
    with kit.slim.disable_delta(net):
        np.testing.assert_array_equal(out(kit, net, x), y0)
    np.testing.assert_array_equal(out(kit, net, x), mixed)
    kit.slim.remove_delta(net, "brief")
    assert not any("brief" in n for n in kit.params(net))
    kit.slim.set_delta(net, ["formal"])
    np.testing.assert_array_equal(out(kit, net, x), alone["formal"])
    with pytest.raises(ValueError, match="'brief'"):
        kit.slim.set_delta(net, "brief")
    kit.slim.remove_delta(net)
    np.testing.assert_array_equal(out(kit, net, x), y0)


def test_the_combination_is_linear_in_its_weights(kit):
    @settings(max_examples=8, deadline=None)
    @given(st.floats(-2, 2), st.floats(-2, 2))
    def check(u, v):
        net = kit.named(a=kit.linear(6, 4))
        kit.fill(net)
        x = kit.tensor(np.random.default_rng(3).standard_normal((5, 6)).astype(np.float32))
        y0 = out(kit, net, x)
        parts = []
        for seed, name in enumerate(("p", "q")):
            kit.slim.apply_delta(net, "lora", ["a"], rank=2, name=name)
            stir(kit, net, seed, what=f"_{name}")
            kit.slim.set_delta(net, name)
            parts.append(out(kit, net, x) - y0)
        kit.slim.set_delta(net, {"p": u, "q": v})
        np.testing.assert_allclose(out(kit, net, x) - y0, u * parts[0] + v * parts[1], atol=2e-5)  # float32, 6 terms

    check()


def test_a_sparse_base_keeps_its_zeros(kit, net, x):
    config = kit.slim.SparseConfig(method="magnitude", sparse_ratio=0.5, targets=["body.query"])
    kit.slim.Compressor(net, config).compress()
    mask = kit.array(kit.params(net)["body.query.weight"]) != 0
    assert mask.mean() == 0.5
    report = kit.slim.apply_delta(net, "lora", ["*query", "*value"], rank=2)
    assert report.layers["body.query"]["keep_zeros"]
    assert not report.layers["body.value"]["keep_zeros"]
    assert "keep the zeros" in str(report)
    stir(kit, net)
    y1 = out(kit, net, x)
    kit.slim.merge_delta(net, unload=True)
    merged = kit.array(kit.params(net)["body.query.weight"])
    np.testing.assert_array_equal(merged != 0, mask)
    np.testing.assert_allclose(out(kit, net, x), y1, rtol=1e-5, atol=1e-5)


def test_zeros_that_nobody_recorded_are_data(kit, net, x):
    weight = kit.params(net)["body.query.weight"]
    kit.assign(weight, np.zeros((8, 8), np.float32))
    report = kit.slim.apply_delta(net, "lora", ["body.query"], rank=2)
    assert not report.layers["body.query"]["keep_zeros"]
    assert report.notes == ()
    stir(kit, net)
    kit.slim.merge_delta(net)
    assert (kit.array(kit.params(net)["body.query.weight"]) != 0).all()
    kit.slim.remove_delta(net)
    report = kit.slim.apply_delta(net, "lora", ["body.query"], rank=2, keep_zeros=True)
    stir(kit, net)
    kit.slim.merge_delta(net)
    assert not kit.array(kit.params(net)["body.query.weight"]).any()  # asked for


def test_the_report_beside_the_weights_is_a_record_too(kit, net, tmp_path):
    from slimkit.core.jobs.folders import made_sparse

    assert made_sparse(tmp_path) == []
    (tmp_path / "sparse_report.json").write_text('{"layers": {"body.query": {}, "gone": {}}}', encoding="utf-8")
    kit.room("bridge").record_zeros_of(net, made_sparse(tmp_path))
    report = kit.slim.apply_delta(net, "lora", ["*query", "*value"], rank=1)
    assert [report.layers[p]["keep_zeros"] for p in ("body.query", "body.value")] == [True, False]


def test_frozen_zeros_count_as_made_while_they_are_frozen(kit, net):
    weight = kit.params(net)["body.query.weight"]
    kit.assign(weight, kit.array(weight) * (np.arange(64).reshape(8, 8) % 2))
    with kit.slim.freeze_zeros(net, targets=["body.query"]):
        assert kit.slim.apply_delta(net, "lora", ["body.query"], rank=1).layers["body.query"]["keep_zeros"]
        kit.slim.remove_delta(net)
    assert not kit.slim.apply_delta(net, "lora", ["body.query"], rank=1).layers["body.query"]["keep_zeros"]


def test_ranks_and_alphas_by_pattern(kit, net):
    report = kit.slim.apply_delta(
        net, "lora", ["*query", "*value", "head"], rank=4, ranks={"*value": 2, "head": 3}, alphas={"head": 1.5}
    )
    assert [report.layers[p]["rank"] for p in ("body.query", "body.value", "head")] == [4, 2, 3]
    assert report.layers["body.value"]["alpha"] == 4  # twice its own rank
    assert report.layers["head"]["alpha"] == 1.5


def test_all_linear_takes_every_linear_layer(kit, net):
    assert set(kit.slim.apply_delta(net, "lora", rank=1).layers) == {"embed", "body.query", "body.value", "head"}


def test_also_train_and_flags_come_back(kit, net):
    kit.slim.freeze_modules(net, include=["embed"])
    before = snapshot(kit, net)
    kit.slim.apply_delta(net, "lora", ["*query"], rank=1, also_train=["head"])
    trains = {n for n, p in kit.params(net).items() if kit.trains(p)}
    assert {"head.weight", "head.bias"} <= trains
    assert not any(n.startswith(("embed", "body.value", "body.norm")) for n in trains)
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), before)


def test_freeze_false_leaves_the_base_training(kit, net):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=1, freeze=False)
    assert all(kit.trains(p) for p in kit.params(net).values())


ERRORS = [
    (("lroa", ["*query"]), {}, ValueError, "lora"),
    ((3, ["*query"]), {}, TypeError, "kind"),
    (("lora", ["*quary"]), {}, PatternError, "quary"),
    (("lora", ["query"]), {}, PatternError, r"Did you mean '\*\.query'"),
    (("lora", ["*query", "nothing"]), {}, PatternError, "nothing"),
    (("lora", ["body.norm"]), {}, UnsupportedError, "LayerNorm"),
    (("lora", ["body"]), {}, UnsupportedError, "body.norm"),
    (("lora", []), {}, TypeError, "targets"),
    (("lora", [3]), {}, TypeError, "targets"),
    (("lora", ["*query"]), {"exclude": ["*value"]}, PatternError, "exclude"),
    (("lora", ["*query"]), {"exclude": ["*"]}, PatternError, "no layer"),
    (("lora", ["*query"]), {"rank": 9}, ValueError, "body.query.*8"),
    (("lora", ["*query", "head"]), {"rank": 4}, ValueError, "head.*3"),
    (("lora", ["*query"]), {"rank": 0}, ValueError, "rank"),
    (("lora", ["*query"]), {"rank": 2.0}, TypeError, "rank"),
    (("lora", ["*query"]), {"alpha": 0}, ValueError, "alpha"),
    (("lora", ["*query"]), {"alpha": "8"}, TypeError, "alpha"),
    (("lora", ["*query"]), {"dropout": 1.0}, ValueError, "dropout"),
    (("lora", ["*query"]), {"dora": 1}, TypeError, "dora"),
    (("lora", ["*query"]), {"init": "svd"}, ValueError, "pissa"),
    (("lora", ["*query"]), {"ranks": {"*value": 2}}, PatternError, "ranks"),
    (("lora", ["*query"]), {"ranks": 2}, TypeError, "ranks"),
    (("lora", ["*query"]), {"rnak": 2}, ValueError, "rank"),
    (("lora", ["*query"]), {"name": "a-b"}, ValueError, "name"),
    (("lora", ["*query"]), {"name": 1}, TypeError, "name"),
    (("lora", ["*query"]), {"also_train": ["hed"]}, PatternError, "hed"),
    (("lora", ["*query"]), {"freeze": 1}, TypeError, "freeze"),
    (("lora", ["*query"]), {"dora": True, "keep_zeros": True}, UnsupportedError, "dora"),
    (("adapter", ["*query"]), {"bottleneck_size": 0}, ValueError, "bottleneck_size"),
    (("adapter", ["*query"]), {"rank": 2}, ValueError, "rank"),
    (("low_rank_adapter", ["*query", "head"]), {"reduction_factor": 4}, ValueError, "reduction_factor"),
]


@pytest.mark.parametrize(("call", "options", "error", "words"), ERRORS)
def test_errors_are_named_and_change_nothing(kit, net, x, call, options, error, words):
    before, y0 = snapshot(kit, net), out(kit, net, x)
    with pytest.raises(error, match=words) as caught:
        kit.slim.apply_delta(net, *call, **options)
    assert isinstance(caught.value, kit.slim.SlimkitError)
    assert same(snapshot(kit, net), before)
    np.testing.assert_array_equal(out(kit, net, x), y0)


def test_unfit_layers_are_skipped_and_reported_when_asked(kit, net):
    report = kit.slim.apply_delta(net, "lora", ["body", "nothing"], rank=1, strict=False)
    assert list(report.layers) == ["body.query", "body.value"]
    assert "LayerNorm" in report.skipped["body.norm"]
    assert report.unmatched == ("nothing",)
    assert "skipped body.norm" in str(report)


def test_the_same_name_twice_is_an_error_and_another_kind_too(kit, net, x):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=1)
    y1 = out(kit, net, x)
    with pytest.raises(ValueError, match=r"body.query carries a delta named 'default'"):
        kit.slim.apply_delta(net, "lora", ["*query", "*value"], rank=1)
    with pytest.raises(UnsupportedError, match="lora"):
        kit.slim.apply_delta(net, "adapter", ["*query"])
    assert not any("value.mindpet" in n for n in kit.params(net))
    np.testing.assert_array_equal(out(kit, net, x), y1)


@pytest.mark.parametrize("call", ["merge_delta", "unmerge_delta", "remove_delta", "save_delta"])
def test_calls_on_a_model_without_delta(kit, net, call, tmp_path):
    kit.slim.freeze_modules(net, include=["*"])
    arguments = (tmp_path / "d",) if call == "save_delta" else ()
    with pytest.raises(ValueError, match=r"delta|nothing"):
        getattr(kit.slim, call)(net, *arguments)
    with pytest.raises(TypeError, match="model"):
        getattr(kit.slim, call)("net", *arguments)


def test_embedding_and_convolution(kit, rng):
    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.table = kit.embedding(10, 6)
            self.conv = kit.conv(1, 4, 3, padding=1)

        def run(self, ids):
            e = self.table(ids)
            return self.conv(e.reshape((2, 1, 3, 6)))

    Net.forward = Net.construct = Net.run
    net = kit.fill(Net())
    ids = kit.tensor(rng.integers(0, 10, (2, 3)).astype(np.int32))
    before, y0 = snapshot(kit, net), out(kit, net, ids)
    report = kit.slim.apply_delta(net, "lora", ["table", "conv"], rank=1)
    assert {p: r["type"] for p, r in report.layers.items()} == {"table": "embedding", "conv": "conv2d"}
    np.testing.assert_array_equal(out(kit, net, ids), y0)
    _, grads = step(kit, net, ids, lr=1e-3)
    _, grads = step(kit, net, ids, lr=1e-3)
    assert all(np.abs(g).max() > 0 for g in grads.values())
    stir(kit, net)
    y1 = out(kit, net, ids)
    assert np.abs(y1 - y0).max() > 1e-2
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(out(kit, net, ids), y1, rtol=1e-4, atol=1e-5)
    kit.slim.remove_delta(net)
    assert same(snapshot(kit, net), before)


def test_grouped_convolutions_are_refused(kit):
    net = kit.named(conv=kit.conv(4, 4, 3, groups=4))
    with pytest.raises(UnsupportedError, match="grouped"):
        kit.slim.apply_delta(net, "lora", ["conv"], rank=1)


def test_a_shared_layer_gets_one_delta(kit, rng):
    layer = kit.linear(4, 4)
    net = kit.named(first=layer, act=kit.relu(), second=layer)
    kit.slim.apply_delta(net, "lora", ["first", "second"], rank=2)
    assert net[0] is net[2]
    assert sum("lora_a" in n for n in kit.params(net)) == 1


def test_deepcopy_of_a_model_with_deltas_is_independent(kit, net, x):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2)
    stir(kit, net)
    twin = copy.deepcopy(net)
    y1 = out(kit, net, x)
    np.testing.assert_array_equal(out(kit, twin, x), y1)
    stir(kit, twin, seed=5)
    np.testing.assert_array_equal(out(kit, net, x), y1)
    kit.slim.remove_delta(twin)
    kit.slim.merge_delta(net)
    np.testing.assert_allclose(out(kit, net, x), y1, rtol=1e-5, atol=1e-5)


def test_lora_plus_groups(kit, net):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2, also_train=["head"])
    fast, slow = kit.slim.lora_plus_groups(net, 1e-3, ratio=4.0)
    assert (fast["lr"], slow["lr"]) == (4e-3, 1e-3)
    assert (len(fast["params"]), len(slow["params"])) == (1, 3)
    with pytest.raises(TypeError, match="lr"):
        kit.slim.lora_plus_groups(net, "1e-3")
    kit.slim.remove_delta(net)
    with pytest.raises(ValueError, match="lora_b"):
        kit.slim.lora_plus_groups(net, 1e-3)


def test_scaling_of_rslora():
    assert rules.LoraSpec(rank=4, alpha=8, rslora=True).scaling == 4.0
    assert rules.LoraSpec(rank=4, alpha=8).scaling == 2.0


def test_dora_learns_the_length_apart_from_the_direction(kit, net):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=2, dora=True)
    weight = kit.array(kit.params(net)["body.query.weight"])
    magnitude = kit.params(net)["body.query.mindpet_delta_lora_magnitude"]
    np.testing.assert_allclose(kit.array(magnitude), np.linalg.norm(weight, axis=1), rtol=1e-5)
    stir(kit, net)
    length = kit.array(magnitude)
    kit.slim.merge_delta(net)
    merged = kit.array(kit.params(net)["body.query.weight"])
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), np.abs(length), rtol=1e-4)


def test_pissa_starts_from_the_principal_part(kit, net):
    kit.slim.apply_delta(net, "lora", ["*query"], rank=8, init="pissa", alpha=8)
    p = kit.params(net)
    a, b = (kit.array(p[f"body.query.mindpet_delta_lora_{s}"]) for s in "ab")
    np.testing.assert_allclose(b @ a, kit.array(p["body.query.weight"]), atol=1e-5)  # full rank: the whole weight


def test_a_weight_that_came_after_merging_is_not_thrown_away(kit):
    """Putting back the weight from before merging would be silently wrong: the new one is nowhere else."""
    net = kit.fill(kit.sequential(kit.linear(4, 3), kit.linear(3, 2)), 0)
    kit.slim.apply_delta(net, "lora", ["0", "1"], rank=2)
    for name, parameter in kit.params(net).items():
        if "lora" in name:
            kit.assign(parameter, np.full(tuple(parameter.shape), 0.5, np.float32))
    kit.slim.merge_delta(net)
    path = next(n for n in kit.params(net) if n == "1.weight")
    kit.assign(kit.params(net)[path], np.ones((2, 3), np.float32))
    before = kit.values(net)
    with pytest.raises(ValueError, match=r"1: the weight was replaced, loaded or trained"):
        kit.slim.unmerge_delta(net)
    assert all((before[n] == v).all() for n, v in kit.values(net).items())
    kit.slim.merge_delta(net, unload=True)
    assert (kit.values(net)["1.weight"] == 1).all()
