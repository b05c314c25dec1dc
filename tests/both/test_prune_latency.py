"""Latency as a budget, in both frameworks: a table, a cut by it, and what it needs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.prune import measuring
from slimkit.core.prune.latency import LatencyTable


class Proportional:
    """Times as a device would have them whose layers cost by their multiplications: no clock in a test."""

    def __init__(self, export, inputs, run=None, device="", budget_s=0.0):
        self.device, self.runtime, self.versions, self.calls = device or "a device", "test", {}, 0

    def layers(self, points):
        Proportional.timed.append(len(points))
        return [1e-3 * n_in * n_out for _, n_in, n_out in points]

    def networks(self, models):
        return [2e-3 * sum(math.prod(s) for s in Proportional.shapes(m).values() if len(s) > 1) + 0.1 for m in models]

    def feeds(self, model):
        return {}

    def written(self, model, path):
        path.write_text(str(self.networks([model])[0]))
        return path

    def of_files(self, made, feeds):
        return [float(path.read_text()) for path in made]


def net(kit, between=None):
    layers = {
        "a": kit.linear(16, 64),
        "b": between or kit.relu(),
        "c": kit.linear(64, 96),
        "d": kit.relu(),
        "e": kit.linear(96, 8),
    }
    return kit.fill(kit.named(**layers))


def sigmoid(kit):
    return kit.torch.nn.Sigmoid() if kit.name == "torch" else kit.ms.nn.Sigmoid()


@pytest.fixture
def times(kit, monkeypatch):
    Proportional.timed = []
    monkeypatch.setattr(Proportional, "networks", Proportional.networks)  # a test may set another
    Proportional.shapes = lambda model: kit.room("prune").Pruner(model)._wing.shapes()
    monkeypatch.setattr(kit.room("latency"), "OnnxTimes", Proportional)
    monkeypatch.setattr(measuring, "_CUTS", measuring._CUTS[2::2])  # MindSpore compiles for each
    return Proportional


def test_a_cut_lands_at_the_latency_that_was_asked_for(kit, times, tmp_path):
    model, x = net(kit), kit.tensor(np.ones((2, 16), np.float32))
    measure = kit.room("latency").measure_latency
    table = measure(model, x, tmp_path / "t.json", alignment=4)
    (told,) = table.networks.values()
    assert told["layers"] == pytest.approx(2.0, rel=0.02)
    assert told["constant"] == pytest.approx(0.1, rel=0.1)
    pruner = kit.room("prune").Pruner(model, x).set_alignment(4).set_budget("latency", tmp_path / "t.json")
    desc = pruner.prune(0.5, [-1])
    ms = desc["made"]["latency"]
    assert ms["before_ms"] == pytest.approx(told["dense_ms"], rel=0.02)
    assert ms["after_ms"] == pytest.approx(0.5 * ms["before_ms"], rel=0.05)
    assert pruner.report()["reached"] == pytest.approx(0.5, abs=0.03)
    after = times(None, None).networks([model])[0]
    assert after == pytest.approx(ms["after_ms"], rel=0.05)
    # What a table holds is not timed again.
    measure(net(kit), x, tmp_path / "t.json", alignment=4)
    assert times.timed == [times.timed[0], 0]


def test_a_latency_budget_says_what_it_needs(kit, times, tmp_path):
    model, x = net(kit), kit.tensor(np.ones((2, 16), np.float32))
    pruner = kit.room("prune").Pruner(model, x)
    with pytest.raises(ArgumentError, match="table"):
        pruner.set_budget("latency")
    with pytest.raises(ArgumentError, match="table"):
        pruner.set_budget("macs", LatencyTable("", "", 1, {}))
    with pytest.raises(ArgumentError, match="no measurement of this network"):
        pruner.set_budget("latency", LatencyTable("", "", 1, {})).prune(0.5)
    assert measuring.measure(times(None, None), model, lambda m: kit.room("prune").Pruner(m, x), tmp_path / "t", 4)
    other = kit.room("prune").Pruner(net(kit, sigmoid(kit)), x).set_budget("latency", tmp_path / "t")
    with pytest.raises(ArgumentError, match="no measurement of this network"):
        other.prune(0.5)
    with pytest.raises(FileFormatError, match="another device"):
        kit.room("latency").measure_latency(model, x, tmp_path / "t", device="another")


def test_a_latency_that_no_cut_reaches_is_refused_and_the_network_left(kit, times, tmp_path):
    model, x = net(kit), kit.tensor(np.ones((2, 16), np.float32))
    times.networks = lambda self, models: [1.0 for _ in models]  # calls, and nothing that widths change
    table = kit.room("latency").measure_latency(model, x, alignment=4)
    shapes = times.shapes(model)
    pruner = kit.room("prune").Pruner(model, x).set_alignment(4).set_budget("latency", table)
    with pytest.raises(ArgumentError, match="the narrowest network takes 100% of the dense one's"):
        pruner.prune(0.5, [])
    assert times.shapes(model) == shapes
    pruner.set_node_reserved_ratio(0.5).prune(0.5, [])  # a floor of one's own is gone to, with a warning
    assert times.shapes(model)["a.weight"][0] == 32


@pytest.mark.parametrize("ms", [0.0, math.nan])
def test_times_that_are_none_make_no_table(kit, times, ms):
    model, x = net(kit), kit.tensor(np.ones((2, 16), np.float32))
    times.networks = lambda self, models: [ms for _ in models]
    with pytest.raises(ArgumentError, match="times of whole networks"):
        kit.room("latency").measure_latency(model, x, alignment=4)


def test_a_table_that_foretells_badly_says_so_wherever_it_is_used(kit, times):
    model, x = net(kit), kit.tensor(np.ones((2, 16), np.float32))
    plain = Proportional.networks
    times.networks = lambda self, models: [ms * (1 + k % 2) for k, ms in enumerate(plain(self, models))]
    table = kit.room("latency").measure_latency(model, x, alignment=4)
    pruner = kit.room("prune").Pruner(model, x).set_alignment(4).set_budget("latency", table)
    pruner.prune(0.7, [])
    assert pruner.report()["latency"]["off_by"] > 0.1
    assert any("foretells this network's time up to" in note for note in pruner.report()["notes"])
