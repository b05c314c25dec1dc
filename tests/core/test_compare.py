"""Several runs on one page."""

from __future__ import annotations

import pytest

from slimkit.core.errors import SlimkitError
from slimkit.core.run.compare import compare_rows, read_report, recipe_rows, write_comparison
from slimkit.core.run.pipeline import run_recipe
from tests.core.test_pipeline import STAGES, NumpyWing, folder, recipe  # noqa: F401  # `folder` is a fixture


@pytest.fixture
def runs(folder):  # noqa: F811
    gentle = [*STAGES[:1], {"prune": {"reserved_ratio": 0.75}}, *STAGES[2:]]
    run_recipe(recipe(), folder, NumpyWing(), folder / "half")
    run_recipe(recipe(stages=gentle, title="A <gentle> one", metrics=None), folder, NumpyWing(), folder / "gentle")
    return [folder / "half", folder / "gentle" / "report.json"]


def test_figures_metrics_and_differing_keys_stand_side_by_side(runs):
    reports = [read_report(run) for run in runs]
    rows = dict(compare_rows(reports))
    assert rows["Parameters"] == ["16 (0.500x)", "24 (0.750x)"]
    assert rows["share"] == ["0.5000 (-0.5000)", ""], "a run without the metric leaves its cell empty"
    differ = dict(recipe_rows(reports))
    assert differ["stages[1].prune.reserved_ratio"] == ["0.5", "0.75"]
    assert set(differ) == {"stages[1].prune.reserved_ratio", "title", "metrics"}


def test_the_page_is_self_contained_and_names_the_runs(runs, tmp_path):
    page = write_comparison(runs, tmp_path / "compare.html").read_text()
    assert "A &lt;gentle&gt; one" in page
    assert str(runs[0]) in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_command_writes_the_page_and_says_the_same_as_json(runs, tmp_path):
    import json

    from typer.testing import CliRunner

    from slimkit.cli import app

    done = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(tmp_path / "c.html"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["rows"]["Parameters"] == ["16 (0.500x)", "24 (0.750x)"]
    assert (tmp_path / "c.html").exists()


def test_what_is_no_run_is_refused_and_writes_nothing(runs, tmp_path):
    (tmp_path / "odd.json").write_text('{"format": "slimkit-report", "version": 2}')
    for wrong in ([runs[0]], [runs[0], tmp_path / "none"], [runs[0], tmp_path / "odd.json"]):
        with pytest.raises(SlimkitError):
            write_comparison(wrong, tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()
