"""A user's own operators and layers: rules from outside the package, and what happens without or with a wrong one."""

from __future__ import annotations

import pytest

from slimkit import PruneTorch, check_pruning, register_operator_rule
from slimkit.core.errors import GraphError
from slimkit.core.prune.custom import CUSTOM

import torch
from torch import nn

_LIBRARY = torch.library.Library("slimkit_tests", "DEF")
for _name in ("swish", "add"):
    _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    _LIBRARY.impl(_name, lambda x: x * x.sigmoid(), "CPU")
    _LIBRARY.impl(_name, torch.empty_like, "Meta")


class Net(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.operator = operator

    def forward(self, x):
        return self.c(self.operator(self.b(self.operator(self.a(x)))))


@pytest.fixture(autouse=True)
def forgotten():
    yield
    CUSTOM.clear()


def analysed(net, x=None):
    job = PruneTorch(net, torch.randn(3, 8) if x is None else x).set_alignment(8)
    left, desc = job.analysis(0.5, [])
    return left / job.report()["params"], desc, job.report()


@pytest.mark.parametrize("name", ["swish", "add"])
def test_an_operator_of_ones_own_is_opaque_until_it_has_a_rule(name):
    """Also one that bears the name of an operator of torch's."""
    torch.manual_seed(0)
    packet = getattr(torch.ops.slimkit_tests, name)
    net = Net(packet)
    kept, _, report = analysed(net)
    assert kept == 1.0
    assert report["without_rule"] == [f"slimkit_tests::{name} in the model"] * 2
    for key in (f"slimkit_tests::{name}", packet, packet.default):
        register_operator_rule(key, "elementwise")
        kept, desc, report = analysed(net)
        assert kept < 0.6
        assert not report["without_rule"]
        assert check_pruning(net, torch.randn(5, 8), desc).holds
        register_operator_rule(key, None)
    assert analysed(net)[0] == 1.0


class Odd(nn.Module):
    """A linear layer whose rows are then summed up, which no rule of the package would cut."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.weight, self.gain = nn.Parameter(torch.randn(n_out, n_in) * 0.1), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.cummax(x @ self.weight.T, 0)[0] * self.gain


def odd(call):
    rows, features = call.inputs[0]
    call.same(features, call.reads("weight", 1))
    made = call.same(call.makes("weight", 0), call.parameters["gain"][0])
    return [[call.whole(rows, "rows follow one another"), made]]


def test_a_layer_of_ones_own_is_one_operator():
    torch.manual_seed(0)
    net = nn.Sequential(Odd(8, 64), nn.ReLU(), Odd(64, 64), nn.ReLU(), nn.Linear(64, 4))
    register_operator_rule(Odd, odd)
    kept, desc, report = analysed(net)
    assert abs(kept - 0.5) <= 0.02
    assert {tuple(v["layers"]) for v in report["variables"].values()} == {("0",), ("2",)}
    assert check_pruning(net, torch.randn(5, 8), desc).holds
    PruneTorch(net).prune_by_desc(desc)
    assert net[2].in_features == net[0].out_features == net[0].weight.shape[0] < 64


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda call: [call.inputs[0]], r"gives outputs of \[\(3, 8\)\], the operator made \[\(3, 64\)\]"),
        (lambda call: [[call.same(*call.inputs[0])]], "calls axes of 3 and 8 the same"),
        (lambda call: call.nothing, "the rule for Odd failed: AttributeError"),
    ],
)
def test_a_wrong_rule_is_named(rule, words):
    register_operator_rule(Odd, rule)
    with pytest.raises(GraphError, match=words):
        analysed(nn.Sequential(Odd(8, 64), nn.Linear(64, 4)))


def test_a_rule_that_says_too_much_is_found_by_the_proof():
    """Elementwise says that every index stays with itself; a flip does not."""

    class Flipped(nn.Module):
        def forward(self, x):
            return x.flip(-1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), Flipped(), nn.ReLU(), nn.Linear(64, 4))
    register_operator_rule(Flipped, "elementwise")
    _, desc, _ = analysed(net)
    with pytest.raises(GraphError, match="not the original with zeros"):
        check_pruning(net, torch.randn(5, 8), desc)
