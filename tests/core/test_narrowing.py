"""What the pruner does about code that contradicts a plan, with a made-up framework that says what its code takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from slimkit.core.prune.graph import Graph
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.core.prune.rehearsal import Contradiction, Rehearsal

WIDTHS = (32, 32, 32, 32, 4)
NAMES = [f"net.{k}" for k in range(len(WIDTHS) - 1)]


def chain() -> Graph:
    """net.0 ... net.3, linear layers one behind the other; value of layer k's output: 2 k + 2."""
    graph = Graph(shapes={f"{n}.weight": (WIDTHS[k + 1], WIDTHS[k]) for k, n in enumerate(NAMES)}, layers=list(NAMES))
    x = graph.add_value((2, WIDTHS[0]), "input")
    for k, name in enumerate(NAMES):
        weight = graph.add_value((WIDTHS[k + 1], WIDTHS[k]), "param", f"{name}.weight")
        y = graph.add_value((2, WIDTHS[k + 1]))
        graph.add("linear", [x, weight, None], [y], scope=name)
        x = y
    graph.outputs.append(x)
    graph.check()
    return graph


class Wing:
    """A framework whose code goes along with a plan unless `objects` says otherwise."""

    framework = "none"
    has_example = True
    one_head_size = False

    def __init__(self, objects: Callable[[set[str]], Contradiction | None], integers: Mapping[str, Any]) -> None:
        self.model = type("Model", (), {})()
        self.objects, self.numbers, self.rehearsed = objects, integers, []

    def trace(self):
        return chain()

    def rehearse(self, plan: PrunePlan, view: Any) -> Rehearsal:
        cut = {path.removesuffix(".weight") for path, axes in plan.indices.items() if self._loses(axes, plan, path)}
        self.rehearsed.append((cut, plan.attributes))
        found = self.objects(cut)
        return Rehearsal(found, {} if found else {"net": {"found": (32, 16)}})

    @staticmethod
    def _loses(axes, plan, path):
        return axes[0] is not None and len(axes[0]) < plan.shapes[path][0]

    def shapes(self):
        return {f"{n}.weight": (WIDTHS[k + 1], WIDTHS[k]) for k, n in enumerate(NAMES)}

    def rows(self, path, axis):
        return iter(np.moveaxis(self.read(path), axis, 0))

    def read(self, path):
        return np.random.default_rng(len(path)).standard_normal(self.shapes()[path])

    def integers(self):
        return self.numbers

    def config(self):
        return {}

    def configured(self, changes):
        return {}

    def stacked(self):
        return []

    def computed(self):
        return set()

    def derived(self, config):
        return {}

    def heads_told(self, config, among):
        return {}

    def row_steps(self):
        return {}


def planned(objects, integers=None):
    wing = Wing(objects, integers or {})
    pruner = PrunerBase(wing).set_alignment(1)
    desc = pruner.analysis(0.5, [-1])[1]
    kept = {p: len(i[0]) if i[0] is not None else wing.shapes()[p][0] for p, i in PrunePlan(desc).indices.items()}
    return [kept.get(f"{n}.weight", WIDTHS[k + 1]) for k, n in enumerate(NAMES)], desc, pruner.report(), wing


def refuse(when, **found):
    return lambda cut: Contradiction("another size", "Code", **found) if when in cut else None


def test_code_that_goes_along_is_cut_as_planned_and_says_what_it_wrote():
    kept, desc, report, wing = planned(lambda cut: None)
    assert kept[3] == 4
    assert max(kept[:3]) < 32
    assert desc["attributes"] == {"net": {"found": [32, 16]}}
    assert len(wing.rehearsed) == 1
    assert report["notes"] == []


@pytest.mark.parametrize(
    "found",
    [
        {"axes": ((4, 1),)},  # value 4 is the output of net.1
        {"near": ((4, 1),)},
        {"operator": 1, "scopes": ("net.1",)},
        {"reads": ((4,),)},
        {"instances": ((1,),), "scopes": ("net.1",)},
        {"scopes": ("net.1",)},
    ],
)
def test_what_is_known_to_be_wrong_stays_whole(found):
    kept, _, report, _ = planned(refuse("net.1", **found))
    assert kept[1] == 32
    assert kept[2] < 32, "what nothing speaks against is pruned"
    assert any("Code" in reason for reason in report["whole"])


@pytest.mark.parametrize("found", [{"instances": ((0, 1, 2),)}, {"reads": ((2, 4, 6),)}])
def test_of_what_a_class_touches_only_what_is_to_blame_stays_whole(found):
    kept, _, _, wing = planned(refuse("net.1", **found, scopes=("net",)))
    assert kept[1] == 32
    assert kept[0] < 32
    assert kept[2] < 32
    assert {"net.0"} in [cut for cut, _ in wing.rehearsed], "each half was tried alone"


def test_the_modules_around_it_stay_whole_where_nothing_is_left_at_the_place():
    kept, _, report, _ = planned(refuse("net.1", scopes=("net.3.inner",)))
    assert kept == [32, 32, 32, 4]
    assert any(note.startswith("all that net touches stays whole") for note in report["notes"])


def test_where_no_plan_runs_nothing_is_cut_and_the_report_says_so():
    kept, desc, report, _ = planned(lambda cut: Contradiction("broken", "Code", scopes=()))
    assert kept == [32, 32, 32, 4]
    assert desc["variables"] == {}
    assert any(note == "nothing is pruned, since no plan runs: broken in Code" for note in report["notes"])


def test_another_number_is_tried_before_anything_stays_whole():
    # net.0 reads 32 features that stay and makes 32 that do not: its own number may speak of either.
    said = []

    def objects(cut):
        said.append(wing.rehearsed[-1][1].get("net.0", {}).get("split_size", [32, 32])[1])
        return Contradiction("another size", "net.0", ("net.0",), operator=0) if said[-1] == 32 else None

    wing = Wing(objects, {"net.0": {"split_size": 32}})
    _, desc = PrunerBase(wing).set_alignment(1).analysis(0.5, [-1])
    assert len(said) == 2
    assert desc["attributes"]["net.0"]["split_size"] == [32, len(desc["variables"]["d0"]["keep"])]
