"""Pruning again and again in both frameworks: plans compose, folders load or are refused, moments follow the cut."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, FileFormatError, PlanError
from slimkit.core.prune.criteria import Criterion
from slimkit.core.prune.plan import PrunePlan


def network(kit):
    layers = {
        "one": kit.conv(3, 16, 3), "norm": kit.batch_norm(16), "act": kit.relu(), "two": kit.conv(16, 24, 3),
        "act2": kit.relu(), "last": kit.conv(24, 4, 1),
    }  # fmt: skip
    return kit.fill(kit.named(**layers))


def example(kit):
    return kit.tensor(np.random.default_rng(7).standard_normal((2, 3, 8, 8)).astype(np.float32))


def pruner(kit, model):
    return kit.slim.Pruner(model, example(kit)).set_alignment(2)


def output(kit, model):
    kit.train_mode(model, False)
    return kit.array(model(example(kit)))


def shapes(kit, model):
    return {n: v.shape for n, v in kit.values(model).items()}


def cut_twice(kit):
    model = network(kit)
    first = pruner(kit, model).prune(0.8, [-1])
    job = pruner(kit, model)
    second = job.prune(0.7, [-1])
    return model, first, second, job.whole_desc()


def test_descs_compose(kit):
    model, first, second, whole = cut_twice(kit)
    assert whole == kit.slim.merge_desc(first, second)
    assert kit.slim.merge_desc(first) == first
    twin = network(kit)
    kit.slim.Pruner(twin, example(kit)).prune_by_desc(json.loads(json.dumps(whole)))
    assert shapes(kit, twin) == shapes(kit, model)
    # The same kept values through the same operators.
    np.testing.assert_array_equal(output(kit, twin), output(kit, model))
    third = pruner(kit, model).prune(0.8, [-1])
    once = kit.slim.merge_desc(first, second, third)
    assert once["variables"] == kit.slim.merge_desc(kit.slim.merge_desc(first, second), third)["variables"]
    assert once["variables"] == kit.slim.merge_desc(first, kit.slim.merge_desc(second, third))["variables"]
    assert [step["reserved_ratio"] for step in once["made"]["steps"]] == [0.8, 0.7, 0.8]


def test_descs_that_do_not_follow_one_another_are_refused(kit):
    _, first, second, _ = cut_twice(kit)
    with pytest.raises(PlanError, match="must begin where the earlier one ends"):
        kit.slim.merge_desc(second, first)
    with pytest.raises(TypeError, match="desc 2"):
        kit.slim.merge_desc(first, "second")
    with pytest.raises(PlanError, match="nothing was pruned"):
        pruner(kit, network(kit)).whole_desc()


def test_a_folder_is_only_saved_if_it_would_load(kit, tmp_path):
    model, first, second, whole = cut_twice(kit)
    for wrong in (second, first):
        with pytest.raises(FileFormatError, match=r"whole_desc|must be the one that desc pruned"):
            kit.slim.save_pruned(tmp_path / "small", model, wrong)
        assert not (tmp_path / "small").exists()
    kit.slim.save_pruned(tmp_path / "small", model, whole)
    fresh = kit.fill(network(kit), seed=5)
    kit.slim.load_pruned(tmp_path / "small", fresh)
    np.testing.assert_array_equal(output(kit, fresh), output(kit, model))
    assert kit.slim.Pruner(fresh, example(kit)).whole_desc()["variables"] == whole["variables"]


def test_a_folder_that_does_not_fit_leaves_the_model_alone(kit, tmp_path):
    from safetensors.numpy import load_file, save_file

    model, _, _, whole = cut_twice(kit)
    kit.slim.save_pruned(tmp_path / "small", model, whole)
    good = load_file(tmp_path / "small" / "model.safetensors")
    name = next(n for n in good if good[n].ndim == 4 and n.startswith("two"))
    changes = [
        {**good, name: np.zeros((3, 3), np.float32)},
        {k: v for k, v in good.items() if k != name},
        {**good, "more": np.zeros(3, np.float32)},
    ]
    for tensors in changes:
        save_file(tensors, tmp_path / "small" / "model.safetensors")
        fresh = network(kit)
        before = kit.values(fresh)
        with pytest.raises(FileFormatError):
            kit.slim.load_pruned(tmp_path / "small", fresh)
        after = kit.values(fresh)
        assert all(np.array_equal(before[n], after[n]) for n in before)
        with pytest.raises(PlanError, match="nothing was pruned"):
            kit.slim.Pruner(fresh, example(kit)).whole_desc()


def make(kit, model):
    if kit.name == "torch":
        return kit.torch.optim.Adam(model.parameters(), lr=0.01)
    return kit.ms.nn.Adam(model.trainable_params(), learning_rate=0.01)


def step(kit, model, optimizer, gradients):
    if kit.name == "torch":
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = kit.tensor(gradient)
        optimizer.step()
    else:
        optimizer(tuple(kit.tensor(g) for g in gradients))


def test_adam_goes_on_as_if_it_had_always_been_small(kit):
    """Adam moves every weight by its own gradients, so that cutting and stepping may change places."""
    model, whole = network(kit), network(kit)
    mine, other = make(kit, model), make(kit, whole)
    _, desc = pruner(kit, network(kit)).analysis(0.6, [-1])
    plan = PrunePlan(desc)
    # Gradients of the weights that train, in the optimizers' order; a norm's statistics are no part of it.
    trained = [n for n, p in kit.params(model).items() if kit.trains(p)]
    full = {n: v.shape for n, v in kit.values(model).items() if n in trained}

    def kept(name, array):
        for axis, index in enumerate(plan.indices.get(name, ())):
            array = array if index is None else np.take(array, index, axis=axis)
        return array

    def gradients(seed, cut):
        chance = np.random.default_rng(seed)
        drawn = {n: chance.standard_normal(shape).astype(np.float32) for n, shape in full.items()}
        return [kept(n, g) if cut else g for n, g in drawn.items()]

    for seed in (1, 2):
        step(kit, model, mine, gradients(seed, False))
        step(kit, whole, other, gradients(seed, False))
    kit.slim.Pruner(model, example(kit)).prune_by_desc(desc)
    report = kit.slim.migrate_optimizer(mine, model, desc)
    assert set(report.cut) == {n for n in plan.indices if n in full}
    assert not kit.slim.migrate_optimizer(mine, model, desc).cut
    for seed in (3, 4):
        step(kit, model, mine, gradients(seed, True))
        step(kit, whole, other, gradients(seed, False))
    values, wanted = kit.values(model), kit.values(whole)
    for name in full:
        np.testing.assert_allclose(values[name], kept(name, wanted[name]), atol=1e-7)  # float32, weight by weight


def test_parameters_stay_the_same_objects(kit):
    """Optimizers, hooks and lists of parameters go on meaning the model's own."""
    model = network(kit)
    before = kit.params(model)
    pruner(kit, model).prune(0.6, [-1])
    after = kit.params(model)
    assert list(before) == list(after)
    assert all(after[n] is before[n] for n in before)


def test_an_optimizer_of_another_model_is_refused(kit):
    model = network(kit)
    desc = pruner(kit, model).prune(0.6, [-1])
    with pytest.raises(ArgumentError, match="holds none of them"):
        kit.slim.migrate_optimizer(make(kit, network(kit)), model, desc)
    with pytest.raises(TypeError, match="optimizer"):
        kit.slim.migrate_optimizer(model, model, desc)
    with pytest.raises(PlanError, match="must be the one that desc pruned"):
        kit.slim.migrate_optimizer(make(kit, model), network(kit), desc)


# Importance ---------------------------------------------------------------------------------------------------


def kept_by(kit, function, **settings):
    job = pruner(kit, network(kit)).set_importance_evaluation_function(function, **settings)
    return {n: v["keep"] for n, v in job.analysis(0.6, [-1])[1]["variables"].items()}


def kept_of_one(kit, function):
    """The kept outputs of the layer `one`."""
    job = pruner(kit, network(kit)).set_importance_evaluation_function(function)
    _, desc = job.analysis(0.6, [-1])
    name = next(n for n, v in job.report()["variables"].items() if "one" in v["layers"])
    return desc["variables"][name]["keep"]


def best_of_one(kit, function, number):
    """The same, by NumPy."""
    scores = np.array([function(row) for row in kit.values(network(kit))["one.weight"]])
    return sorted(np.argsort(-scores, kind="stable")[:number].tolist())


def test_a_function_gets_the_frameworks_tensor(kit):
    kinds, ranks = set(), set()

    def score(weights):
        kinds.add(type(weights).__module__.partition(".")[0])
        ranks.add(weights.ndim)
        return weights.abs().mean().item()  # NumPy arrays have no abs()

    kept = kept_of_one(kit, score)
    assert kept == best_of_one(kit, lambda w: np.abs(w).mean(), len(kept))
    assert (kinds, ranks) == ({kit.name}, {3})


NUMPY_ONLY = [
    lambda w: float((w**2).mean()),
    lambda w: float(np.square(w).sum()),
    lambda w: np.linalg.norm(w.reshape(-1).astype(np.float64)),
    lambda w: np.abs(w).sum() / w.size,
]


@pytest.mark.parametrize("function", NUMPY_ONLY)
def test_functions_written_for_numpy_go_on_working(kit, function):
    kept = kept_of_one(kit, function)
    assert kept == best_of_one(kit, function, len(kept))


def test_a_function_cannot_change_the_model(kit):
    model = network(kit)
    before = kit.values(model)

    def clear(weights):
        weights[:] = 0
        return 1.0

    pruner(kit, model).set_importance_evaluation_function(clear).analysis(0.6, [-1])
    after = kit.values(model)
    assert all(np.array_equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w: w.nothing(), "'one'.*AttributeError"),
        (lambda w: 1 / 0, "'one'.*ZeroDivisionError"),
        (lambda w: float("nan"), "finite number.*'one'"),
        (lambda w: None, "finite number.*'one'"),
        (lambda w: "3", "finite number.*'one'"),
        (lambda w: w, "finite number.*'one'"),
    ],
)
def test_what_goes_wrong_in_a_function_names_the_layer(kit, function, message):
    with pytest.raises(ArgumentError, match=message):
        kept_by(kit, function)


class Cubes(Criterion):
    """|w|^3 of the makers alone."""

    name, roles = "cubes", ("out",)

    def elements(self, weight, gradient):
        return np.abs(weight) ** 3


class Drift(Criterion):
    """|g|, whatever the weight."""

    name, needs = "drift", "gradient"

    def elements(self, weight, gradient):
        return np.abs(gradient)


def test_a_criterion_of_ones_own(kit):
    kept = kept_of_one(kit, Cubes)
    assert kept == best_of_one(kit, lambda w: (np.abs(w) ** 3).sum(), len(kept))
    with pytest.raises(ArgumentError, match="calibration"):
        pruner(kit, network(kit)).set_importance_evaluation_function(Drift())
    assert kept_by(kit, Drift(), calibration=[example(kit)])


def test_weights_trained_in_between_are_scored_anew(kit):
    model = network(kit)
    job = pruner(kit, model)
    _, before = job.analysis(0.6, [-1])
    for name, parameter in kit.params(model).items():
        if name == "one.weight":
            kit.assign(parameter, kit.values(model)[name][::-1].copy())
    _, after = job.analysis(0.6, [-1])
    assert before["variables"] != after["variables"]


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        ("l1", np.nan),
        ("l2", np.inf),
        ("random", np.nan),
        ("bn_scale", -np.inf),
        ("activation", np.nan),
        ("taylor", np.nan),
    ],
)
def test_weights_that_are_no_numbers_are_refused(kit, method, bad):
    model = network(kit)
    values = kit.values(model)["two.weight"]
    values[3, 0, 0, 0] = bad
    kit.assign(kit.params(model)["two.weight"], values)
    job = pruner(kit, model).set_importance_evaluation_function(method, calibration=[example(kit)])
    with pytest.raises(ArgumentError, match=r"1 of 3456 values of 'two.weight' are NaN or infinite"):
        job.prune(0.6, [-1])
    assert shapes(kit, model) == shapes(kit, network(kit))


def test_large_weights_are_numbers(kit):
    """1e25 squared is beyond float32, and no reason to refuse anything."""
    model = network(kit)
    values = kit.values(model)["two.weight"]
    values[3] = 1e25
    kit.assign(kit.params(model)["two.weight"], values)
    job = pruner(kit, model).set_importance_evaluation_function("l2")
    _, desc = job.analysis(0.6, [-1])
    name = next(n for n, v in job.report()["variables"].items() if "two" in v["layers"])
    assert 3 in desc["variables"][name]["keep"]


# Another tool's plans -----------------------------------------------------------------------------------------


def masks_of(desc):
    """A plan as msModelSlim writes it: one mask a layer and side."""
    plan, masks = PrunePlan(desc), {}

    def mask(size, kept):
        return [len(kept), "".join("-" if k in set(kept.tolist()) else "x" for k in range(size))]

    for path, axes in plan.indices.items():
        layer, _, leaf = path.rpartition(".")
        if leaf in ("weight", "gamma"):
            for side, size, kept in zip(("output", "input") if len(axes) > 1 else ("input",), plan.shapes[path], axes):
                if kept is not None:
                    masks.setdefault(layer, {})[side] = mask(size, kept)
    return masks


def test_masks_of_msmodelslim_are_read(kit, tmp_path):
    model = network(kit)
    desc = pruner(kit, model).prune(0.6, [-1])
    twin = network(kit)
    job = kit.slim.Pruner(twin, example(kit))
    job.prune_by_desc(json.loads(json.dumps(masks_of(desc))))
    np.testing.assert_array_equal(output(kit, twin), output(kit, model))
    kit.slim.save_pruned(tmp_path / "small", twin, job.whole_desc())
    fresh = network(kit)
    kit.slim.load_pruned(tmp_path / "small", fresh)
    np.testing.assert_array_equal(output(kit, fresh), output(kit, model))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"nothing": {"output": [1, "-"]}}, "'nothing'"),
        ({"two": {"output": [3, "---x"]}}, "'two.weight' has 4 indices"),
        ({"two": {"output": [9, "-" * 20 + "x" * 4]}}, "output of 'two'"),
        ({"two": {"output": [20, "-" * 20 + "?" * 4]}}, "output of 'two'"),
        ({"two": {"output": 3}}, "output of 'two'"),
        (
            {"two": {"output": [20, "-" * 20 + "x" * 4]}},
            "do not fit one another",
        ),  # nobody tells the layer that reads it
    ],
)
def test_masks_that_do_not_fit_change_nothing(kit, edit, message):
    model = network(kit)
    before = shapes(kit, model)
    with pytest.raises(PlanError, match=message):
        kit.slim.Pruner(model, example(kit)).prune_by_desc(edit)
    assert shapes(kit, model) == before


def test_layers_that_stay_whole_are_another_question_with_another_answer(kit):
    """Two layers alike: the scores of one stood for the other's, since what may go was called alike."""

    def asked(*lists):
        net = kit.fill(
            kit.named(a=kit.linear(8, 32), b=kit.relu(), c=kit.linear(32, 32), d=kit.relu(), e=kit.linear(32, 8))
        )
        pruner = kit.room("prune").Pruner(net, kit.tensor(np.ones((2, 8), np.float32))).set_alignment(1)
        pruner.set_importance_evaluation_function("l2", calibration=[kit.tensor(np.ones((2, 8), np.float32))])
        return [pruner.analysis(0.7, whole)[1] for whole in lists][-1]["variables"]

    assert asked(["a"], ["c"]) == asked(["c"])
    assert asked(["c"], ["a"]) == asked(["a"])
