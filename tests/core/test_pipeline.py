"""The runner of recipes, driven by a small NumPy wing: order, resuming, refusals, and the report it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.crew import CrewFramework
from slimkit.core.jobs.framework import JobResult
from slimkit.core.jobs.measurement import LayerMeasurement, Measurement, show, summary_rows
from slimkit.core.run import report
from slimkit.core.run.pipeline import run_recipe
from slimkit.core.run.recipe import parse_recipe

ROOT = Path(__file__).parents[2]

TASK = """
    import numpy as np
    def model(width=8):
        return {"w": np.random.standard_normal((width, 4)), "mask": np.ones((width, 4))}
    def data():
        return {"train": [1], "example": np.ones(4), "calibration": [np.ones(4)]}
    def words(model, data, dense):
        return {"norm": "large"}
    def metrics(model, data, dense):
        return {"norm": float(abs(model["w"]).sum()), "share": len(model["w"]) / len(dense["w"])}
    def counted(model, data, dense):
        data.setdefault("calls", []).append(1)
        return {"calls": len(data["calls"])}
"""


class NumpyWing(CrewFramework):
    """A model is a dict of arrays; training adds noise, pruning drops rows, sparsify sets zeros."""

    def __init__(self, stop_at=None):
        self.stop_at, self.ran = stop_at, []

    def seed(self, seed):
        np.random.seed(seed)

    def versions(self):
        return {"numpy": np.__version__}

    def build(self, recipe, folder, edits, example):
        from slimkit.core.jobs import factory

        model = factory.make(recipe.model, folder, "model")
        for edit in edits:
            model = {k: v[: edit["rows"]] for k, v in model.items()}
        return model

    def run(self, kind, options, model, context):
        if kind == self.stop_at:
            (context.directory / "half.bin").write_bytes(b"x")
            raise KeyboardInterrupt
        self.ran.append(kind)
        if kind in ("train", "finetune"):
            noise = np.random.standard_normal(model["w"].shape)
            return JobResult(
                {**model, "w": model["w"] + noise}, facts={"headline": "trained"}, curves={"loss": [2.0, 1.0]}
            )
        if kind == "prune":
            rows = int(len(model["w"]) * options.reserved_ratio)
            assert context.dense()["w"].shape[0] == 8
            return JobResult({k: v[:rows] for k, v in model.items()}, edit={"rows": rows})
        if kind == "export":
            return JobResult(model)
        w = model["w"].copy()
        w[np.abs(w) < np.median(np.abs(w))] = 0
        return JobResult({**model, "w": w})

    def measure(self, model, example, dense=None):
        w = model["w"]
        layer = LayerMeasurement("w", "Dense", w.shape, len(w), w.size, int((w == 0).sum()), w.size)
        beside = None if dense is None else 0.4
        return Measurement(w.size, w.size, layer.zeros, w.size, w.nbytes, 0.1, (layer,), beside)

    def save(self, model, file):
        files.write_tensors(file, model)

    def load(self, model, file):
        model.update(files.read_tensors(file)[0])

    def digest(self, model):
        return files.digest_array(model["w"])


STAGES = [
    {"train": {"epochs": 1}},
    {"prune": {"reserved_ratio": 0.5}},
    {"finetune": {"epochs": 1}},
    {"sparsify": {"sparse_ratio": 0.5}},
]


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Pictures are drawn only where the page is looked at; they would take most of the time."""
    if "page" not in request.node.name:
        monkeypatch.setattr(report.plots, "all_plots", lambda found: dict.fromkeys(report.plots.PICTURES, ""))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))
    return tmp_path


def recipe(**changes):
    content = {
        "version": 1, "name": "tiny", "model": "task.py:model", "data": "task.py:data",
        "metrics": "task.py:metrics", "stages": STAGES,
    }  # fmt: skip
    return parse_recipe({**content, **changes})


def numbers(found):
    return [{k: v for k, v in s.items() if k != "seconds"} for s in found["stages"]]


def test_stages_run_in_order_and_leave_files(folder):
    wing = NumpyWing()
    found = run_recipe(recipe(), folder, wing, folder / "run")
    assert wing.ran == ["train", "prune", "finetune", "sparsify"]
    names = [s["name"] for s in found["stages"]]
    assert names == ["00-load", "01-train", "02-prune", "03-finetune", "04-sparsify"]
    assert found["dense"] == 1, "the dense model is the one before the first shrinking stage"
    assert found["complete"]
    assert [s["metrics"]["share"] for s in found["stages"]] == [1, 1, 0.5, 0.5, 0.5]
    assert found == files.read_json(folder / "run" / "report.json")
    for name in names[1:]:
        assert (folder / "run" / "stages" / name / "model.safetensors").exists()
    assert len({s["seed"] for s in found["stages"]}) == 5


def test_a_stage_that_leaves_the_model_as_it_is_has_the_figures_of_the_one_before(folder):
    stages = [{"export": {}}, STAGES[0], {"export": {}}, STAGES[1], {"export": {}}]
    found = run_recipe(recipe(metrics="task.py:counted", stages=stages), folder, NumpyWing(), folder / "run")
    assert [s["metrics"]["calls"] for s in found["stages"]] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("stop", ["train", "prune", "finetune", "sparsify"])
def test_a_stopped_run_resumes_to_the_same_numbers(folder, stop):
    whole = run_recipe(recipe(), folder, NumpyWing(), folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), folder, NumpyWing(stop_at=stop), folder / "run")
    assert not list((folder / "run" / "stages").glob(".*")), "nothing half written"
    rest = NumpyWing()
    resumed = run_recipe(recipe(), folder, rest, folder / "run")
    kinds = ["train", "prune", "finetune", "sparsify"]
    assert rest.ran == kinds[kinds.index(stop) :]
    assert numbers(resumed) == numbers(whole)


def test_a_finished_run_is_read_not_repeated(folder):
    first = run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    idle = NumpyWing()
    assert run_recipe(recipe(), folder, idle, folder / "run") == first
    assert idle.ran == []


def test_a_killed_run_resumes_to_the_same_numbers(folder):
    whole = run_recipe(recipe(), folder, NumpyWing(), folder / "whole")
    code = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.core.test_pipeline import NumpyWing, recipe
        from slimkit.core.run.pipeline import run_recipe
        class Killed(NumpyWing):
            def run(self, kind, options, model, context):
                if kind == "finetune":
                    (context.directory / "half.bin").write_bytes(b"x")
                    os.kill(os.getpid(), 9)
                return super().run(kind, options, model, context)
        folder = Path({str(folder)!r})
        run_recipe(recipe(), folder, Killed(), folder / "run")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    partial = files.read_json(folder / "run" / "report.json")
    assert not partial["complete"]
    assert len(partial["stages"]) == 3
    assert "not finished" in (folder / "run" / "report.html").read_text()
    rest = NumpyWing()
    assert numbers(run_recipe(recipe(), folder, rest, folder / "run")) == numbers(whole)
    assert rest.ran == ["finetune", "sparsify"]
    assert not list((folder / "run" / "stages").glob(".*"))


def test_another_recipe_in_the_same_folder_is_refused_and_restart_clears_it(folder):
    run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    changed = [*STAGES[:1], {"prune": {"reserved_ratio": 0.75}}, *STAGES[2:]]
    with pytest.raises(ConfigError, match=r"first difference: stages\[1\].prune.reserved_ratio"):
        run_recipe(recipe(stages=changed), folder, NumpyWing(), folder / "run")
    found = run_recipe(recipe(stages=changed), folder, NumpyWing(), folder / "run", restart=True)
    assert found["stages"][2]["metrics"]["share"] == 0.75


def test_options_that_came_since_a_run_was_begun_are_no_other_recipe(folder):
    """Every option at its default is taken out of the record, as an earlier version would have left it."""
    run_recipe(recipe(), folder, NumpyWing(), folder / "run")
    marker = folder / "run" / "run.json"
    record = json.loads(marker.read_text())
    record["recipe"] = recipe().model_dump(mode="json", exclude_unset=True)
    assert record["recipe"] != recipe().model_dump(mode="json")
    marker.write_text(json.dumps(record))
    idle = NumpyWing()
    run_recipe(recipe(), folder, idle, folder / "run")
    assert idle.ran == []
    record["recipe"]["seed"] = 7
    marker.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="first difference: seed"):
        run_recipe(recipe(), folder, NumpyWing(), folder / "run")


def test_a_model_factory_that_changed_is_noticed_on_resume(folder):
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), folder, NumpyWing(stop_at="prune"), folder / "run")
    (folder / "task2.py").write_text(textwrap.dedent(TASK).replace("standard_normal((", "uniform(size=("))
    other = folder / "run" / "run.json"
    record = files.read_json(other)
    record["recipe"]["model"] = "task2.py:model"
    files.write_json(other, record)
    with pytest.raises(ConfigError, match="the factory gives other weights"):
        run_recipe(recipe(model="task2.py:model"), folder, NumpyWing(), folder / "run")


def test_two_runs_in_one_folder_are_refused(folder):
    class Nosy(NumpyWing):
        def run(self, kind, options, model, context):
            with pytest.raises(ConfigError, match="another run is using"):
                run_recipe(recipe(), folder, NumpyWing(), folder / "run")
            return super().run(kind, options, model, context)

    wing = Nosy()
    run_recipe(recipe(), folder, wing, folder / "run")
    assert wing.ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "task.py:model"}, "data: the factory must return a mapping"),
        ({"metrics": "task.py:words"}, r"metrics\['norm'\] must be a number"),
        ({"metrics": "task.py:model"}, "metrics: task.py:model raised TypeError"),
    ],
)
def test_a_task_that_breaks_its_promises_is_named(folder, change, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        run_recipe(recipe(**change), folder, NumpyWing(), folder / "run")


def test_an_output_that_cannot_be_a_folder_is_named(folder):
    (folder / "taken").write_text("")
    with pytest.raises(ConfigError, match="output: cannot use"):
        run_recipe(recipe(), folder, NumpyWing(), folder / "taken")


def test_the_page_is_self_contained_well_formed_and_true(folder):
    found = run_recipe(recipe(title="A <tiny> & odd title"), folder, NumpyWing(), folder / "run")
    page = (folder / "run" / "report.html").read_text()
    assert "A &lt;tiny&gt; &amp; odd title" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 2 * 5, "each for a page's column and for a phone's"
    for svg in page.split("<svg")[1:]:
        ET.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    for row in summary_rows(found):
        assert row[2] in page
    assert page == report.render(json.loads(json.dumps(found))), "the same report gives the same page"


def test_figures_are_shown_as_people_read_them():
    assert show(999, "count") == "999"
    assert show(1_500_000_000, "count") == "1.500 G"
    assert show(512, "bytes") == "512 B"
    assert show(90_900_000, "bytes") == "90.9 MB"
