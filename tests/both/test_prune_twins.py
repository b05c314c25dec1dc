"""Twins in two frameworks: the same weights and settings keep the same indices, and a plan of one cuts the other.

The golden file holds plans and results of the torch wing; regenerate with `python -m tests.both.test_prune_twins`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slimkit.core.errors import PlanError
from tests import kits

GOLDEN = Path(__file__).parents[1] / "golden" / "prune_twins.json"


def cnn(kit):
    net = kit.named(
        one=kit.conv(3, 16, 3),
        norm=kit.batch_norm(16),
        act=kit.relu(),
        two=kit.conv(16, 24, 3),
        act2=kit.relu(),
        deep=kit.conv(24, 24, 3, groups=24),
        last=kit.conv(24, 4, 1),
    )
    return kit.fill(net), (2, 3, 8, 8)


def mlp(kit):
    layers = {"a": kit.linear(6, 32), "b": kit.relu(), "c": kit.linear(32, 24), "d": kit.relu(), "e": kit.linear(24, 3)}
    return kit.fill(kit.named(**layers)), (5, 6)


NETS = {"cnn": cnn, "mlp": mlp}
CASES = [
    ("cnn", "l1"),
    ("cnn", "bn_scale"),
    ("cnn", "activation"),
    ("mlp", "l2"),
    ("mlp", "taylor"),
    ("mlp", "lamp"),
    ("mlp", "output"),
]


def inputs(kit, shape):
    return kit.tensor(np.random.default_rng(7).standard_normal(shape).astype(np.float32))


def pruned(kit, net, importance):
    model, shape = NETS[net](kit)
    x = inputs(kit, shape)
    pruner = kit.room("prune").Pruner(model, x).set_alignment(4)
    pruner.set_importance_evaluation_function(importance, calibration=[x])
    return model, x, pruner.prune(0.5, [-1])


def run(kit, model, x):
    if kit.name == "torch":
        model.eval()
    else:
        model.set_train(False)
    return kit.array(model(x))


@pytest.mark.parametrize(("net", "importance"), CASES)
def test_the_same_indices_stay(kit, net, importance):
    golden = json.loads(GOLDEN.read_text())[f"{net} {importance}"]
    model, x, desc = pruned(kit, net, importance)
    assert {n: v["keep"] for n, v in desc["variables"].items()} == golden["keep"]
    # float32; both frameworks sum up to 300 products of size one in their own order
    np.testing.assert_allclose(run(kit, model, x), np.array(golden["output"]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("net", list(NETS))
def test_a_plan_of_one_framework_cuts_the_other(kit, net):
    golden = json.loads(GOLDEN.read_text())[next(f"{n} {i}" for n, i in CASES if n == net)]
    model, shape = NETS[net](kit)
    x = inputs(kit, shape)
    kit.room("prune").Pruner(model, x).prune_by_desc(golden["desc"])
    np.testing.assert_allclose(run(kit, model, x), np.array(golden["output"]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("net", list(NETS))
def test_zeros_of_a_padded_plan_are_what_a_cut_drops(kit, net):
    golden = json.loads(GOLDEN.read_text())[next(f"{n} {i}" for n, i in CASES if n == net)]
    model, shape = NETS[net](kit)
    x = inputs(kit, shape)
    held = {n: {**v, "keep": list(range(v["size"]))} for n, v in golden["desc"]["variables"].items()}
    gone = {n: sorted(set(held[n]["keep"]) - set(v["keep"])) for n, v in golden["desc"]["variables"].items()}
    kit.room("prune").Pruner(model, x).prune_by_desc(
        {**golden["desc"], "variables": held, "padded": gone, "attributes": {}, "groups": {}}
    )
    np.testing.assert_allclose(run(kit, model, x), np.array(golden["output"]), atol=2e-5, rtol=1e-4)


def compensated(kit):
    """A net whose batch norms hold statistics of other data, cut to 60 % and refitted on three batches."""
    rng = np.random.default_rng(11)
    net = kit.named(
        one=kit.conv(3, 16, 3, bias=False),
        norm=kit.batch_norm(16),
        act=kit.relu(),
        two=kit.conv(16, 24, 3),
        norm2=kit.batch_norm(24),
        act2=kit.relu(),
        last=kit.conv(24, 4, 1),
    )
    kit.fill(net)
    for name, width in (("norm", 16), ("norm2", 24)):
        mean, variance = kit.statistics(dict(kit.children(net))[name])
        kit.assign(mean, rng.standard_normal(width).astype(np.float32))
        kit.assign(variance, rng.uniform(0.5, 3, width).astype(np.float32))
    data = [rng.standard_normal((8, 3, 8, 8)).astype(np.float32) for _ in range(4)]
    x = kit.tensor(data.pop())
    before = run(kit, net, x)
    pruner = kit.room("prune").Pruner(net, x).set_alignment(4).set_importance_evaluation_function("l1")
    pruner.set_compensation([kit.tensor(batch) for batch in data])
    desc = pruner.prune(0.6, [-1])
    return net, x, desc, before, pruner.report()["compensation"]


def test_compensation_is_the_same_rule_in_the_same_order(kit):
    """Layers are refitted as they run, norms keep their statistics; what comes out is the other framework's."""
    golden = json.loads(GOLDEN.read_text())["cnn compensated"]
    net, x, desc, before, report = compensated(kit)
    assert {n: v["keep"] for n, v in desc["variables"].items()} == golden["keep"]
    assert report == golden["report"]
    after = run(kit, net, x)
    # float64 fits of float32 inputs; both frameworks sum up to 216 products of size one in their own order
    np.testing.assert_allclose(after, np.array(golden["output"]), atol=1e-4, rtol=1e-4)
    assert np.square(after - before).mean() < 0.2 * before.var()


def test_a_plan_of_another_net_is_refused(kit):
    golden = json.loads(GOLDEN.read_text())["cnn l1"]
    model, shape = mlp(kit)
    with pytest.raises(PlanError, match="desc was made for a model with"):
        kit.room("prune").Pruner(model, inputs(kit, shape)).prune_by_desc(golden["desc"])


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_labels_reach_the_loss_alone(kit, importance):
    """A data loader's (inputs, labels): the model takes the first, the loss both; other labels, other scores."""
    seen = []

    def kept(labels):
        model, shape = mlp(kit)
        x = inputs(kit, shape)

        def loss(output, batch):
            seen.append(len(batch))
            return (output * batch[1]).sum()

        pruner = kit.room("prune").Pruner(model, x).set_alignment(1)
        pruner.set_importance_evaluation_function(importance, calibration=[(x, kit.tensor(labels))], loss=loss)
        return {n: v["keep"] for n, v in pruner.prune(0.5, [-1])["variables"].items()}

    chance = np.random.default_rng(3)
    first, second = (chance.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
    assert kept(first) == kept(first) != kept(second)
    assert set(seen) == {2}


def _write():
    kit = kits.make("torch")
    found = {}
    for net, importance in CASES:
        model, x, desc = pruned(kit, net, importance)
        keep = {n: v["keep"] for n, v in desc["variables"].items()}
        output = np.round(run(kit, model, x).astype(np.float64), 6).tolist()
        found[f"{net} {importance}"] = {"keep": keep, "output": output, "desc": desc}
    net, x, desc, _, report = compensated(kit)
    keep = {n: v["keep"] for n, v in desc["variables"].items()}
    output = np.round(run(kit, net, x).astype(np.float64), 6).tolist()
    found["cnn compensated"] = {"keep": keep, "report": report, "output": output}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _write()
