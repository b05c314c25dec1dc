"""Plans of several budgets from one pass: what a mild one drops, a harder one drops too; the twins agree."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.both.test_prune_twins import inputs, mlp, run

RATIOS = [0.4, 0.85, 0.7, 0.55]
# Parameters left of 1,091, the same in both frameworks.
LEFT = {
    ("output", "measured"): [431, 893, 757, 583],
    ("l1", "uniform"): [437, 903, 785, 625],
    ("l1", "global"): [431, 903, 775, 619],
}


@pytest.mark.parametrize(("importance", "allocation"), list(LEFT))
def test_nested_plans_drop_what_milder_ones_drop_and_can_be_executed(kit, importance, allocation):
    net, shape = mlp(kit)
    x = inputs(kit, shape)
    pruner = kit.room("prune").Pruner(net, x).set_alignment(2).set_allocation(allocation)
    pruner.set_importance_evaluation_function(importance, calibration=[x])
    points = pruner.frontier(RATIOS, [-1], nested=True)["points"]
    assert [p["asked"] for p in points] == RATIOS
    assert [p["left_params"] for p in points] == LEFT[importance, allocation]
    falling = sorted(points, key=lambda p: -p["asked"])
    kept = [{n: set(v["keep"]) for n, v in p["plan"]["variables"].items()} for p in falling]
    for mild, hard in pairwise(kept):
        assert mild.keys() <= hard.keys()
        assert all(hard[name] <= mild[name] for name in mild)
    assert [p["foretold_loss"] is None for p in points] == [importance != "output"] * len(RATIOS)
    before = run(kit, net, x).shape
    pruner.set_compensation([x])
    pruner.prune_by_desc(points[0]["plan"], repair=True)
    assert pruner.report()["left_params"] == points[0]["left_params"]
    assert pruner.report()["compensation"]["refitted"]
    assert run(kit, net, x).shape == before
