"""Latency as the budget of the command and of a recipe's stage: a table read, or made and kept, and what is said."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core import files
from slimkit.core.errors import UnsupportedError
from slimkit.core.prune.latency import LatencyTable
from tests.both.test_jobs import command, recipe, task, write_recipe
from tests.both.test_prune_latency import times

__all__ = ["task", "times"]
ASKED = {"budget": "latency", "latency_table": "t.json", "alignment": 4, "reserved_ratio": 0.6}
FLAGS = ["--budget", "latency", "--latency-table", "t.json", "--alignment", 4, "--keep-ratio", 0.6]


def test_both_doors_measure_once_and_say_what_was_asked_foretold_and_measured(kit, task, times, tmp_path):
    found = command(kit, task, "prune", *FLAGS, "-o", "small", "--example", "2,8")
    told = found["report"]["latency"]
    (network,) = LatencyTable.read(tmp_path / "t.json").networks.values()
    assert told["before_ms"] == pytest.approx(network["dense_ms"], rel=0.05)
    assert told["after_ms"] == pytest.approx(0.6 * told["before_ms"], rel=0.1)
    assert told["measured"]["before_ms"] == pytest.approx(network["dense_ms"])
    assert told["measured"]["after_ms"] == pytest.approx(told["after_ms"], rel=0.1)
    assert "foretold" in (tmp_path / "small" / "README.md").read_text()
    timed = list(times.timed)
    headline = recipe(kit, task, tmp_path, {"prune": ASKED})["stages"][-1]["facts"]["headline"]
    assert times.timed == timed  # the file tells this network already
    assert f"{told['before_ms']:.3g} to {told['after_ms']:.3g} ms foretold" in headline
    assert "ms measured" in headline


def test_a_dry_run_keeps_no_table_and_a_foreign_one_is_trusted_but_not_tried(kit, task, times, tmp_path):
    found = command(kit, task, "prune", *FLAGS, "-o", "small", "--example", "2,8", "--dry-run")
    assert "measured" not in found["report"]["latency"]
    assert not (tmp_path / "t.json").exists()
    command(kit, task, "prune", *FLAGS, "-o", "first", "--example", "2,8")
    table = files.read_json(tmp_path / "t.json")
    files.write_json(tmp_path / "t.json", {**table, "device": "Ascend 310P3"})
    found = command(kit, task, "prune", *FLAGS, "-o", "second", "--example", "2,8")
    assert found["report"]["latency"]["measured"] is None
    assert "Ascend 310P3" in found["report"]["latency"]["not_measured"]
    given = ["prune", "-f", kit.name, "--factory", f"{task}:net", *map(str, FLAGS), "-o", "third", "--example", "4,8"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code
    assert "another device" in str(done.exception)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("lacking", [["--budget", "latency"], ["--latency-table", "t.json"]])
def test_the_budget_and_its_table_go_together(kit, task, tmp_path, lacking):
    given = ["prune", "-f", kit.name, "--factory", f"{task}:net", *lacking, "-o", "small", "--example", "2,8"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code
    assert "must be given together" in str(done.exception)
    keys = {"reserved_ratio": 0.6, **({"budget": "latency"} if "latency" in lacking else {"latency_table": "t.json"})}
    write_recipe(kit, task, tmp_path, {"prune": keys})
    done = CliRunner().invoke(app, ["run", "r.yaml", "--check"])
    assert done.exit_code
    assert "must be given together" in str(done.exception)


def test_a_table_needs_a_folder_to_stand_in(kit, task, times):
    flags = [*FLAGS[:3], "nowhere/t.json", *FLAGS[4:]]
    given = ["prune", "-f", kit.name, "--factory", f"{task}:net", *map(str, flags), "-o", "small", "--example", "2,8"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code
    assert "--latency-table: there is no folder nowhere" in str(done.exception)
    assert times.timed == []


def test_what_measuring_cannot_do_after_the_cut_is_told_and_no_error(kit, task, times, monkeypatch, tmp_path):
    command(kit, task, "prune", *FLAGS, "-o", "first", "--example", "2,8")

    def refuses(self, model, path):
        raise UnsupportedError("no such file can be written")

    monkeypatch.setattr(times, "written", refuses)
    found = command(kit, task, "prune", *FLAGS, "-o", "small", "--example", "2,8")
    assert found["report"]["latency"]["not_measured"] == "no such file can be written"
    assert json.loads((tmp_path / "small" / "prune_report.json").read_text())["report"]["latency"]["measured"] is None
