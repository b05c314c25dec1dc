"""How much of a sparsification is left, against a clock that is simulated."""

from __future__ import annotations

import pytest

from slimkit.core.sparse.call_order import CallOrder
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.methods import METHODS
from slimkit.core.sparse.remaining import Estimate

SHAPES = {"q": (384, 384), "k": (384, 384), "v": (384, 384), "o": (384, 384), "up": (1536, 384), "down": (384, 1536)}
PASSES = [[("q", "k", "v")], [("o",)], [("up",)], [("down",)]]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Machine:
    """How long everything takes: in other proportions than the estimate begins with.

    Data goes through "files" (one block at a time is read, watched and written), "blocks" of a model that was watched
    as a whole, or the "whole" model for each layer anew.
    """

    def __init__(self, method, models, way="files", slow_start=0.0):
        self.clock, self.crowd, self.n_blocks = Clock(), 1.0, 6
        self.models, self.way, self.slow_start = models, way, slow_start
        self.costs = [cost * by for cost, by in zip(METHODS[method].cost, (3.0, 2.0, 2.0, 2.5))]
        names = [f"h.{i}.{n}" for i in range(self.n_blocks) for n in SHAPES]
        self.layers = {n: SparseLayer(n, "linear", SHAPES[n.split(".")[2]]) for n in names}
        self.steps = []

    def solving(self, layer):
        work = layer.n_in, layer.size, layer.n_in**3, layer.size * layer.n_in
        return sum(cost * n for cost, n in zip(self.costs, work))

    def take(self, seconds):
        self.clock.now += seconds * self.crowd

    def reached(self, blocks):
        found, now = {}, 0.0 if self.way == "files" else 0.3  # embeddings
        for i in blocks:
            for name, (n_out, n_in) in SHAPES.items():
                now += 0.05 + n_out * n_in * 2e-7  # attention and norms, and the product
                found[f"h.{i}.{name}"] = now
        return found

    def parts(self):
        """The blocks that are one part together."""
        return [range(self.n_blocks)] if self.way == "whole" else [[i] for i in range(self.n_blocks)]

    def run(self, estimate):
        for part in self.parts():
            times = self.reached(part if self.way == "files" else range(self.n_blocks))
            start = times[f"h.{part[0] - 1}.down"] if f"h.{part[0] - 1}.down" in times else 0.0
            if self.way == "blocks" and not part[0]:
                start = 0.3
            forward = max(times[f"h.{i}.down"] for i in part) - start
            if self.way == "files":
                self.take(0.2 + forward)  # loaded, and sent through once to see the order of the layers
            passes = [[tuple(f"h.{i}.{n}" for n in feed) for feed in feeds] for i in part for feeds in PASSES]
            estimate.opened([f"h.{i}.{n}" for i in part for n in SHAPES], passes, times)
            for feeds in passes:
                self.calibrate(estimate, feeds, times, start)
            if self.way != "whole":
                self.take(0.1 + self.models * forward)  # on to the next block
            estimate.closed()

    def calibrate(self, estimate, feeds, times, start):
        (feed,) = feeds
        self.take(0.05 + self.models * (max(times[n] for n in feed) - start))
        sums = self.layers[feed[0]].n_in ** 2 * 2e-6 * self.models
        self.take(sums)
        estimate.added(sums * self.crowd)
        estimate.replayed(feed[0])
        for name in feed:
            seconds = self.solving(self.layers[name]) + self.slow_start
            self.slow_start = 0.0
            self.take(seconds)
            self.steps.append((self.clock.now, estimate.finished(name, seconds * self.crowd)))


def ratios(machine):
    """What was told after each layer, over what was then needed."""
    end = machine.clock.now
    return [step.seconds_left / (end - now) for now, step in machine.steps if end > now]


@pytest.mark.parametrize("method", ["wanda", "hessian", "par", "par_v2"])
@pytest.mark.parametrize("way", ["files", "blocks", "whole"])
def test_time_left_is_right_from_the_second_layer_on(method, way):
    machine = Machine(method, models=2 if method.startswith("par") else 1, way=way, slow_start=2.0)
    machine.take(5.0)  # the data is read, the embeddings are loaded: neither comes again
    machine.run(Estimate(machine.layers, method, machine.models, clock=machine.clock))
    found = ratios(machine)
    assert found[1:6] == pytest.approx([1.0] * 5, abs=0.25)
    assert found[6:] == pytest.approx([1.0] * len(found[6:]), abs=0.15)
    assert [(s.done, s.total) for _, s in machine.steps] == [(i + 1, 36) for i in range(36)]


def test_time_left_follows_a_machine_that_becomes_busy():
    machine = Machine("hessian", models=1)
    estimate = Estimate(machine.layers, "hessian", clock=machine.clock)
    finished = estimate.finished

    def busier(name, seconds):
        machine.crowd = 3.0 if name >= "h.2" else 1.0
        return finished(name, seconds)

    estimate.finished = busier
    machine.run(estimate)
    assert ratios(machine)[24:] == pytest.approx([1.0] * len(ratios(machine)[24:]), abs=0.15)


def test_time_left_of_a_run_that_goes_on():
    machine = Machine("hessian", models=1)
    estimate = Estimate(machine.layers, "hessian", clock=machine.clock)
    for name in list(machine.layers)[:12]:
        estimate.skip(name)
    machine.parts = lambda: [[i] for i in range(2, 6)]
    machine.run(estimate)
    assert machine.steps[0][1].done == 13
    found = ratios(machine)
    assert found[1:6] == pytest.approx([1.0] * 5, abs=0.25)
    assert found[6:] == pytest.approx([1.0] * len(found[6:]), abs=0.15)


def test_time_left_without_data_goes_by_the_weights():
    layers = {f"h.{i}.{n}": SparseLayer(f"h.{i}.{n}", "linear", SHAPES[n]) for i in range(2) for n in ("q", "k", "up")}
    now = iter([0.0, 5.0, 6.0])
    estimate = Estimate(layers, "magnitude", clock=lambda: next(now))
    assert estimate.finished("h.0.q").seconds_left == 5.0 * (1 + 4 + 1 + 1 + 4)
    # The first layer also loaded libraries: it counts no more as soon as there is another.
    assert estimate.finished("h.0.k").seconds_left == pytest.approx((6 - 5) * (4 + 1 + 1 + 4))


def test_the_first_batch_of_a_forward_warms_up():
    clock = Clock()
    calls = CallOrder(clock=clock)
    for warm in (5.0, 0.0, 0.0):
        calls.batch()
        clock.now += 1.0 + warm
        calls.note("q", [0])
        clock.now += 2.0
        calls.note("up", [1])
    calls.batch()
    clock.now += 1.0
    calls.note("q", [0])
    assert calls.reached == {"q": 4.0, "up": 9.0}
