"""Sparsity in both frameworks: ratios, patterns, the order of layers, zeros that stay, and every error."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError, PatternError, UnsupportedError
from slimkit.core.sparse import SparseConfig

METHODS = ("magnitude", "wanda", "hessian", "par", "par_v2")


def chain(kit):
    return kit.fill(kit.named(first=kit.linear(16, 12), act=kit.relu(), last=kit.linear(12, 8)))


def batches(kit, n=4, rows=32, width=16, seed=1):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width // 4, width))  # correlated channels, as activations are

    def draw():
        return rng.standard_normal((rows, width // 4)) @ mix + 0.3 * rng.standard_normal((rows, width))

    return [kit.tensor(draw().astype(np.float32)) for _ in range(n)]


def weights(kit, model):
    return {n: v for n, v in kit.values(model).items() if v.ndim > 1}


def run(kit, model, data, **kw):
    compressor = kit.slim.Compressor(model, SparseConfig(**kw))
    assert compressor.compressed_model is None
    report = compressor.compress(data)
    assert compressor.compressed_model is model
    return report, compressor.masks


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_exact_ratio(kit, method):
    model = chain(kit)
    report, masks = run(kit, model, batches(kit), method=method, sparse_ratio=0.6)
    for name, weight in weights(kit, model).items():
        layer = name.removesuffix(".weight")
        rows = report["layers"][layer]
        assert (weight == 0).sum() == rows["zeros"]
        assert abs((weight == 0).mean() - 0.6) < 0.04  # wanda rounds in every row: 16 * 0.6 -> 10
        assert ((weight != 0) == np.asarray(masks[layer])).all()
    assert json.loads(json.dumps(report)) == report
    assert report["skipped"] == {}
    assert report["unmatched"] == []


@pytest.mark.parametrize("method", ["magnitude", "hessian"])
def test_each_layer_reports_progress(kit, method):
    steps = []
    compressor = kit.slim.Compressor(chain(kit), SparseConfig(method=method))
    compressor.compress(batches(kit), on_progress=steps.append)
    assert [(s.layer, s.done, s.total) for s in steps] == [("first", 1, 2), ("last", 2, 2)]
    assert steps[0].seconds_left > 0 == steps[1].seconds_left


def test_progress_with_measured_ratios_counts_each_layer_once(kit):
    steps = []
    compressor = kit.slim.Compressor(chain(kit), SparseConfig(method="wanda", uniform=False))
    compressor.compress(batches(kit), on_progress=steps.append)
    assert [(s.layer, s.done, s.total) for s in steps] == [("first", 1, 2), ("last", 2, 2)]
    assert steps[0].seconds_left > 0 == steps[1].seconds_left


@pytest.mark.parametrize("method", METHODS)
def test_same_masks_and_values_in_every_kit(method):
    from tests import kits
    from tests.conftest import INSTALLED

    found = {}
    for name in INSTALLED:
        kit = kits.make(name)
        model = chain(kit)
        run(kit, model, batches(kit), method=method)
        found[name] = weights(kit, model)
    first, *others = found.values()
    for other in others:
        for a, b in zip(first.values(), other.values()):
            assert ((a == 0) == (b == 0)).all()
            np.testing.assert_allclose(a, b, atol=1e-4)  # float32 factorisations of two libraries


def test_a_residual_stream_that_is_not_known_is_refused(kit):
    model = chain(kit)
    before = weights(kit, model)
    with pytest.raises(UnsupportedError, match="chain of blocks"):
        run(kit, model, batches(kit), method="par", residual=True)
    for name, weight in weights(kit, model).items():
        np.testing.assert_array_equal(weight, before[name])
    with pytest.raises(ConfigError, match="residual"):
        SparseConfig(method="hessian", residual=True)


def residual_chain(kit, norm_last=False):
    """Three blocks that add to what passes through them; `norm_last`: and norm the sum, as BERT's do."""

    class Block(kit.Module):
        def __init__(self):
            super().__init__()
            self.norm = kit.layer_norm(16)
            self.up, self.act, self.down = kit.linear(16, 24), kit.relu(), kit.linear(24, 16)

        def forward(self, x):
            if norm_last:
                return self.norm(x + self.down(self.act(self.up(x))))
            return x + self.down(self.act(self.up(self.norm(x))))

        construct = forward

    class Chain(kit.Module):
        def __init__(self):
            super().__init__()
            several = kit.torch.nn.ModuleList if kit.name == "torch" else kit.ms.nn.CellList
            self.blocks = several([Block() for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

        construct = forward

    return kit.fill(Chain())


def test_the_residual_stream_is_fitted_alike_in_every_kit():
    from tests import kits
    from tests.conftest import INSTALLED

    found = {}
    for name in INSTALLED:
        kit = kits.make(name)
        data, error = batches(kit, n=3, rows=64), []
        for residual in (True, False):
            model = residual_chain(kit)
            dense = [kit.array(model(x)) for x in data]
            run(kit, model, data, method="par", sparse_ratio=0.7, residual=residual)
            error.append(sum(np.square(kit.array(model(x)) - d).sum() for x, d in zip(data, dense)))
            found.setdefault(residual, []).append(weights(kit, model))
        assert error[0] < 0.98 * error[1]
    for first, *others in found.values():
        for other in others:
            for a, b in zip(first.values(), other.values()):
                assert ((a == 0) != (b == 0)).mean() <= 0.01  # ties of two libraries' sums
                np.testing.assert_allclose(a, b, atol=1e-3)


def test_better_methods_leave_less_error(kit):
    data = batches(kit, n=8, rows=64, width=48)
    error = {}
    for method in METHODS:
        model = kit.fill(kit.sequential(kit.linear(48, 40, bias=False)))
        dense = [kit.array(model(x)) for x in data]
        run(kit, model, data, method=method)
        error[method] = np.linalg.norm(np.concatenate([kit.array(model(x)) - d for x, d in zip(data, dense)]))
    assert error["hessian"] < 0.7 * error["wanda"] < 0.7 * error["magnitude"]
    assert error["par"] < error["hessian"] * 0.9
    assert error["par_v2"] <= error["par"] * 1.01


@pytest.mark.parametrize("pattern", ["2:4", "4:2", "4:8", "1:4"])
@pytest.mark.parametrize("method", ["magnitude", "hessian", "par"])
def test_pattern_holds_along_input_channels(kit, method, pattern):
    model = kit.fill(kit.sequential(kit.linear(16, 12), kit.linear(12, 8)))
    config = {"ignore": ["1"]} if pattern == "4:8" else {}
    run(kit, model, batches(kit), method=method, pattern=pattern, **config)
    keep, group = {"2:4": (2, 4), "4:2": (2, 4), "4:8": (4, 8), "1:4": (1, 4)}[pattern]
    weight = next(iter(weights(kit, model).values()))
    assert ((weight.reshape(12, -1, group) != 0).sum(2) <= keep).all()
    assert (weight == 0).mean() == 1 - keep / group


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
def test_convolutions_plain_grouped_and_depthwise(kit, method, groups):
    model = kit.fill(kit.sequential(kit.conv(8, 8, 3, padding=1, stride=2, groups=groups)))
    rng = np.random.default_rng(3)
    data = [kit.tensor(rng.standard_normal((4, 8, 9, 9)).astype(np.float32)) for _ in range(2)]
    dense = kit.array(model(data[0]))
    report, _ = run(kit, model, data, method=method)
    (row,) = report["layers"].values()
    assert row["rows"] == 2 * 4 * 25
    assert abs(row["ratio"] - 0.5) < 0.07  # depthwise wanda: 9 columns a row
    bias = 0  # the error of the report is about W x alone, so the bias is taken out
    for key, value in kit.values(model).items():
        if key.endswith("bias"):
            bias = value.reshape(1, -1, 1, 1)
    after = np.concatenate([kit.array(model(x)) for x in data])
    fresh = kit.fill(kit.sequential(kit.conv(8, 8, 3, padding=1, stride=2, groups=groups)))
    before = np.concatenate([kit.array(fresh(x)) for x in data])
    assert np.allclose(before[:4], dense)
    if method != "par":  # par shifts the bias too
        expected = np.linalg.norm(after - before) / np.linalg.norm(before - bias)
        assert abs(row["output_error"] - expected) < 1e-3 * max(1, expected)


def test_pattern_of_a_convolution_runs_along_channels(kit):
    model = kit.fill(kit.sequential(kit.conv(8, 4, 3)))
    run(kit, model, None, method="magnitude", pattern="2:4")
    weight = next(iter(weights(kit, model).values()))
    assert ((weight.reshape(4, 2, 4, 9) != 0).sum(2) == 2).all()


def test_targets_and_ignore(kit):
    model = chain(kit)
    before = weights(kit, model)
    report, masks = run(kit, model, None, targets=["*"], ignore=["re:la.."])
    assert list(masks) == ["first"]
    assert report["ignored"] == ["last"]
    assert (weights(kit, model)["last.weight"] == before["last.weight"]).all()
    report, _ = run(kit, chain(kit), None, targets=["first", "nothing"], strict=False)
    assert report["unmatched"] == ["nothing"]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"targets": ["frist"]}, PatternError),
        ({"ignore": ["frist"]}, PatternError),
        ({"ignore": ["*"]}, PatternError),
        ({"pattern": "4:8", "method": "magnitude"}, ArgumentError),  # 12 inputs
    ],
)
def test_configurations_that_do_not_fit_the_model(kit, config, error):
    model = chain(kit)
    before = kit.values(model)
    with pytest.raises(error):
        run(kit, model, batches(kit), **config)
    assert all((before[n] == v).all() for n, v in kit.values(model).items())


def unchanged(kit, model, before):
    after = kit.values(model)
    return before.keys() == after.keys() and all((before[n] == v).all() for n, v in after.items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (lambda kit: None, ArgumentTypeError, "dataset must be a list of batches"),
        (lambda kit: 5, ArgumentTypeError, "dataset must be a list of batches"),
        (lambda kit: [], ArgumentError, "dataset must be .* at least one batch"),
        (lambda kit: (b for b in batches(kit)), ArgumentTypeError, "only once"),
        (lambda kit: batches(kit)[0], ArgumentTypeError, "list of batches"),
    ],
    ids=["none", "number", "empty", "generator", "tensor"],
)
@pytest.mark.parametrize("config", [{"method": "wanda"}, {"uniform": False}])
def test_data_sets_that_are_refused(kit, data, error, words, config):
    model = chain(kit)
    before = kit.values(model)
    with pytest.raises(error, match=words):
        run(kit, model, data(kit), **config)
    assert unchanged(kit, model, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
def test_inputs_that_are_not_finite_name_the_layer_and_leave_the_model(kit, method, value):
    model = chain(kit)
    before = kit.values(model)
    bad = np.ones((64, 16), np.float32)
    bad[3, 3] = value
    with pytest.raises(ArgumentError, match=r"finite inputs to every layer.*'first'"):
        run(kit, model, [*batches(kit), kit.tensor(bad)], method=method)
    assert unchanged(kit, model, before)


def test_weights_that_are_not_finite_name_the_layer_and_leave_the_rest(kit):
    model = chain(kit)
    last = kit.params(model)["last.weight"]
    kit.assign(last, np.full((8, 12), np.nan, np.float32))
    first = kit.values(model)["first.weight"]
    with pytest.raises(ArgumentError, match="weight of 'last' must be finite"):
        run(kit, model, batches(kit), method="hessian")
    np.testing.assert_array_equal(kit.values(model)["first.weight"], first)


def test_weights_without_linear_algebra_are_left_alone_and_reported(kit):
    model = chain(kit)
    whole = kit.linear(8, 4, bias=False)
    if kit.name == "torch":
        whole.weight = kit.torch.nn.Parameter(whole.weight.detach().to(kit.torch.int8), requires_grad=False)
    else:
        whole.weight = kit.ms.Parameter(kit.ms.Tensor(np.ones((4, 8), np.int8)), requires_grad=False)
    model = kit.named(whole=whole, first=kit.fill(kit.linear(16, 12)))
    report, masks = run(kit, model, None)
    assert list(masks) == ["first"]
    assert "has no linear algebra" in report["skipped"]["whole"]
    assert "nt8" in report["skipped"]["whole"]
    with pytest.raises(ArgumentError, match=r"can be sparse.*'whole'.*no linear algebra"):
        run(kit, model, None, targets=["whole"])
    report, _ = run(kit, model, None, targets=["whole", "first"])
    assert list(report["layers"]) == ["first"]


def test_an_error_in_the_middle_leaves_the_model(kit):
    model = chain(kit)
    before = kit.values(model)
    with pytest.raises((RuntimeError, ValueError)):
        run(kit, model, [batches(kit)[0], kit.tensor(np.ones((4, 7), np.float32))], method="hessian")
    assert all((before[n] == v).all() for n, v in kit.values(model).items())


def test_few_rows_and_dead_layers_fall_back_and_say_so(kit):
    report, _ = run(kit, chain(kit), [kit.tensor(np.ones((3, 16), np.float32))], method="hessian")
    assert set(report["fallbacks"]) == {"first", "last"}
    assert "3 calibration rows" in report["fallbacks"]["first"]
    zero = [kit.tensor(np.zeros((64, 16), np.float32))]
    report, _ = run(kit, chain(kit), zero, method="hessian")
    assert "all zero" in report["fallbacks"]["first"]
    assert report["layers"]["first"]["zeros"] == 96


def test_dead_columns_go_first_and_singular_grams_are_damped(kit):
    data = np.random.default_rng(2).standard_normal((64, 16)).astype(np.float32)
    data[:, 1] = data[:, 0]  # singular
    data[:, 5] = 0  # dead
    model = chain(kit)
    report, masks = run(kit, model, [kit.tensor(data)], method="hessian", damping=0.0)
    assert report["layers"]["first"]["damping"] > 0
    assert not np.asarray(masks["first"])[:, 5].any()
    assert all(np.isfinite(v).all() for v in kit.values(model).values())


def test_result_does_not_depend_on_batching(kit):
    rows = np.concatenate([kit.array(b) for b in batches(kit)])
    one, many = chain(kit), chain(kit)
    run(kit, one, [kit.tensor(rows)], method="hessian")
    run(kit, many, [kit.tensor(r) for r in np.array_split(rows, 7)], method="hessian")
    for a, b in zip(weights(kit, one).values(), weights(kit, many).values()):
        assert ((a == 0) == (b == 0)).all()
        np.testing.assert_allclose(a, b, atol=1e-4)  # sums of float32 in another order


def test_progressive_reaches_the_ratio(kit):
    report, _ = run(kit, chain(kit), batches(kit), method="hessian", progressive=True)
    assert report["ratio"] == 0.5


def change(kit, model, data, dense):
    now = np.concatenate([kit.array(model(x)) for x in data])
    return np.linalg.norm(now - dense) / np.linalg.norm(dense)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "hessian", "par"])
def test_measured_ratios_keep_the_total_and_are_never_worse(kit, method):
    data, held_out = batches(kit), batches(kit, n=8)[4:]
    equal, spread = chain(kit), chain(kit)
    dense = [np.concatenate([kit.array(equal(x)) for x in some]) for some in (data, held_out)]
    run(kit, equal, data, method=method)
    report, _ = run(kit, spread, data, method=method, uniform=False)
    for some, before in zip((data, held_out), dense):
        assert change(kit, spread, some, before) <= change(kit, equal, some, before)
    assert abs(report["ratio"] - 0.5) < 0.005  # one weight in each layer's rounding
    rows = {row.get("rows", 4 * 32) for row in report["layers"].values()}
    assert rows == {4 * 32}  # what is kept was fitted to all batches


def uneven(kit):
    """A chain of blocks whose last adds a tenth of what the others do."""
    model = residual_chain(kit)
    weight = model.blocks[2].down.weight
    kit.assign(weight, 0.1 * kit.array(weight))
    return model


@pytest.mark.parametrize("method", ["wanda", "hessian", "par"])
def test_measured_ratios_find_the_block_that_matters_least(kit, method):
    data, held_out = batches(kit, n=8), batches(kit, n=12)[8:]
    equal, spread = uneven(kit), uneven(kit)
    dense = np.concatenate([kit.array(equal(x)) for x in held_out])
    run(kit, equal, data, method=method)
    report, _ = run(kit, spread, data, method=method, uniform=False)
    assert change(kit, spread, held_out, dense) < change(kit, equal, held_out, dense)
    ratio = {name: row["ratio"] for name, row in report["layers"].items()}
    assert ratio["blocks.2.down"] > 0.55 > 0.5 > ratio["blocks.0.down"]
    facts = report["allocation"]
    assert (facts["kept"], facts["held_out"], facts["probe_batches"]) == ("measured", True, 1)
    assert facts["measured_error"] < facts["uniform_error"]


@pytest.mark.parametrize("extra", [{}, {"residual": True}])
def test_measured_ratios_cost_less_than_half_a_run(kit, extra):
    data, ran = batches(kit, n=16), []
    for uniform in (True, False):
        model, calls = residual_chain(kit), [0]

        def count(*_, calls=calls):
            calls[0] += 1

        for block in model.blocks:
            block.register_forward_pre_hook(count)
        run(kit, model, data, method="par" if extra else "hessian", uniform=uniform, **extra)
        ran.append(calls[0])
    assert ran[1] < 1.5 * ran[0]


def test_measured_ratios_that_are_worse_on_other_batches_are_not_kept(kit, monkeypatch):
    from slimkit.core.sparse import allocate

    def wrong(costs, ratios, sizes, ratio):
        # What costs most loses most: as wrong as can be.
        found = good(costs, ratios, sizes, ratio)
        return {name: 2 * ratio - r for name, r in found.items()}

    good = allocate.spread
    monkeypatch.setattr(allocate, "spread", wrong)
    data = batches(kit, n=8)
    equal, spread = uneven(kit), uneven(kit)
    run(kit, equal, data, method="wanda")
    report, _ = run(kit, spread, data, method="wanda", uniform=False)
    assert report["allocation"]["kept"] == "uniform"
    for a, b in zip(weights(kit, equal).values(), weights(kit, spread).values()):
        np.testing.assert_array_equal(a, b)


def test_inputs_that_are_not_finite_are_named_and_the_model_is_as_it_was(kit):
    model, data = chain(kit), batches(kit)
    before = weights(kit, model)
    spoilt = kit.array(data[0]).copy()
    spoilt[3, 2] = np.inf
    with pytest.raises(ArgumentError, match="input of 'first'"):
        run(kit, model, [kit.tensor(spoilt), *data[1:]], method="wanda", uniform=False)
    for name, weight in weights(kit, model).items():
        np.testing.assert_array_equal(weight, before[name])


def test_wrong_model_and_config(kit):
    with pytest.raises(ArgumentTypeError, match="model"):
        kit.slim.Compressor(3, SparseConfig())
    with pytest.raises(ArgumentTypeError, match="cfg"):
        kit.slim.Compressor(chain(kit), {"method": "wanda"})


def test_freeze_zeros_needs_zeros_and_fitting_masks(kit):
    model = chain(kit)
    with pytest.raises(ArgumentError, match="zeros"):
        kit.slim.freeze_zeros(model)
    with pytest.raises(ArgumentError, match="masks"):
        kit.slim.freeze_zeros(model, {"frist": np.ones((12, 16), bool)})
    with pytest.raises(ArgumentError, match="shape"):
        kit.slim.freeze_zeros(model, {"first": np.ones((12, 15), bool)})
    with pytest.raises(PatternError):
        kit.slim.freeze_zeros(model, targets=["frist"])


@pytest.mark.parametrize(
    ("kw", "error", "words"),
    [
        ({"method": "hesian"}, ArgumentError, "hessian"),
        ({"mode": "dense"}, ArgumentError, "mode"),
        ({"sparse_ratio": 1.0}, ArgumentError, "sparse_ratio"),
        ({"sparse_ratio": 0.0}, ArgumentError, "sparse_ratio"),
        ({"sparse_ratio": -0.5}, ArgumentError, "sparse_ratio"),
        ({"sparse_ratio": 50}, (ArgumentError, ArgumentTypeError), "sparse_ratio"),
        ({"sparse_ratio": float("nan")}, ArgumentError, "sparse_ratio"),
        ({"sparse_ratio": "0.5"}, ArgumentTypeError, "sparse_ratio"),
        ({"sparse_ratio": True}, ArgumentTypeError, "sparse_ratio"),
        ({"progressive": 1}, ArgumentTypeError, "progressive"),
        ({"uniform": "no"}, ArgumentError, "uniform"),
        ({"uniform": 1}, ArgumentTypeError, "uniform"),
        ({"pattern": "4:4"}, ArgumentError, "pattern"),
        ({"pattern": "24"}, ArgumentError, "pattern"),
        ({"pattern": 24}, ArgumentTypeError, "pattern"),
        ({"pattern": "2:4", "sparse_ratio": 0.7}, ConfigError, "sparse_ratio"),
        ({"pattern": "2:4", "uniform": False}, ConfigError, "uniform"),
        ({"targets": "first"}, ArgumentTypeError, "targets"),
        ({"ignore": [3]}, ArgumentTypeError, "ignore"),
        ({"asymmetric": True, "method": "par", "sequential": False}, ConfigError, "sequential"),
    ],
)
def test_config_refuses(kw, error, words):
    with pytest.raises(error, match=words):
        SparseConfig(**kw)


def test_config_goes_through_json():
    config = SparseConfig("sparse", "par", 0.7, True, True, targets=["a*"])
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ArgumentError, match="sparse_ratio"):
        SparseConfig.from_dict({"sparse_rato": 0.5})
