"""The proof of a plan, and rules for a user's own operators, through the same doors in both frameworks."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, ArgumentTypeError, GraphError, PlanError


def net(kit):
    layers = {
        "a": kit.linear(8, 64),
        "n": kit.layer_norm(64),
        "r": kit.relu(),
        "b": kit.linear(64, 48),
        "s": kit.relu(),
    }
    return kit.fill(kit.named(**layers, c=kit.linear(48, 4)))


def example(kit):
    return kit.tensor(np.random.default_rng(5).standard_normal((6, 8)).astype(np.float32))


def test_a_plan_is_proved_behind_a_layer_norm(kit):
    model, x = net(kit), example(kit)
    prune = kit.room("prune")
    _, desc = prune.Pruner(model, x).set_alignment(8).analysis(0.5, [])
    assert any(len(v["keep"]) < 64 == v["size"] for v in desc["variables"].values())
    before = kit.array(model(x))
    found = prune.check_pruning(model, x, desc, tolerance=1e-5)  # float32, sums of 64 products
    assert found.holds
    assert found.difference <= 1e-5 * found.scale
    assert len(found.statistics) == 1
    assert np.array_equal(kit.array(model(x)), before)


def test_a_plan_that_couples_too_little_is_found_out(kit):
    model, x = net(kit), example(kit)
    prune = kit.room("prune")
    _, desc = prune.Pruner(model, x).set_alignment(8).analysis(0.5, [])
    wrong = copy.deepcopy(desc)
    # the reader of one variable is told to keep other indices than the layer that makes it
    name = next(n for n, v in wrong["variables"].items() if v["size"] == 48)
    kept = wrong["variables"][name]["keep"]
    others = [i for i in range(48) if i not in kept] + kept
    wrong["variables"]["other"] = {"size": 48, "keep": sorted(others[: len(kept)])}
    wrong["axes"]["c.weight"] = [axis if axis != name else "other" for axis in wrong["axes"]["c.weight"]]
    with pytest.raises(GraphError, match="not the original with zeros"):
        prune.check_pruning(model, x, wrong)


def test_a_plan_of_another_net_is_not_proved(kit):
    model, x = net(kit), example(kit)
    prune = kit.room("prune")
    _, desc = prune.Pruner(model, x).analysis(0.5, [])
    other = kit.fill(kit.named(a=kit.linear(8, 16), b=kit.linear(16, 4)))
    with pytest.raises(PlanError, match="desc was made for"):
        prune.check_pruning(other, x, desc)


@pytest.mark.parametrize(("operator", "rule"), [(3, "elementwise"), ("a::b", 3), ("a::b", "elementwize")])
def test_nonsense_is_no_rule(kit, operator, rule):
    with pytest.raises((ArgumentTypeError, ArgumentError), match=r"operator|rule"):
        kit.room("prune").register_operator_rule(operator, rule)
