"""What is told of jobs that run, were stopped, or have ended; by their logs, locks and state."""

from __future__ import annotations

import json
import os
import sys

import pytest

from slimkit.core.errors import ConfigError
from slimkit.core.joblog import LOG, JobLog, own_command, read_log
from slimkit.core.jobs import crew, fitting
from slimkit.core.jobs.framework import FitRun
from slimkit.core.jobs.options import TrainOptions
from slimkit.core.jobs.status import lines, status
from slimkit.core.locks import BLOCKS, SHARDS, holder, locked


@pytest.fixture
def walk(tmp_path):
    state = tmp_path / "out" / BLOCKS
    state.mkdir(parents=True)
    (state / "job.json").write_text("{}")
    (state / "block-00000.json").write_text("{}")
    log = JobLog(state)
    log.begun("sparsify", blocks=4, batches=8, processes=2)
    log.note("layer", layer="blocks.1.up", done=5, total=16, rows=4096, seconds_left=200.0)
    return tmp_path / "out"


def test_a_stopped_walk_says_how_far_it_came_and_what_goes_on(walk):
    JobLog(walk / BLOCKS).note("stopped", why="Terminated")
    found = status(walk)
    assert found["state"] == "stopped"
    assert found["done"] == {"blocks": [1, 4], "layers": [5, 16]}
    assert (found["rows"], found["at"], found["why"], found["holder"]) == (4096, "blocks.1.up", "Terminated", None)
    assert found["seconds_left"] is None
    assert found["go_on"] == own_command()
    said = "\n".join(lines(found))
    assert "blocks: 1 of 4" in said
    assert "go on with: " in said


@pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is read from Linux's list")
def test_a_running_walk_names_its_holder_and_the_time_left(walk):
    with locked(walk / BLOCKS, "dst", inside=True):
        found = status(walk)
        assert holder(walk / BLOCKS / ".lock") == {"pid": os.getpid()}
    assert found["state"] == "running"
    assert found["holder"]["pid"] == os.getpid()
    assert 190 < found["seconds_left"] <= 200
    assert "held by process" in "\n".join(lines(found))
    assert holder(walk / BLOCKS / ".lock") is None


def test_a_line_that_a_kill_cut_short_is_left_out(walk):
    with open(walk / BLOCKS / LOG, "a") as handle:
        handle.write('{"time": 1, "event": "lay')
    assert [event["event"] for event in read_log(walk / BLOCKS)] == ["begun", "layer"]


def test_shards_recipes_trainings_and_results_are_told_apart(tmp_path):
    shards = tmp_path / "shards"
    (shards / SHARDS / "finished").mkdir(parents=True)
    (shards / SHARDS / "job.json").write_text("{}")
    (shards / SHARDS / "finished" / "model-00001-of-00002.safetensors").touch()
    JobLog(shards / SHARDS).begun("prune", shards=2)
    assert status(shards)["done"] == {"shards": [1, 2]}
    training = tmp_path / "training"
    (training / ".slimkit-train" / "last").mkdir(parents=True)
    (training / ".slimkit-train" / "last" / "trainer.json").write_text('{"global_step": 7}')
    assert status(training)["done"] == {"updates": [7, None]}
    assert status(training)["go_on"] is None
    fitting.begin(TrainOptions(), training, FitRun(0, 100, False), {"command": "train"})
    assert status(training)["go_on"] == own_command()
    result = tmp_path / "result"
    result.mkdir()
    with pytest.raises(ConfigError, match="no job"):
        status(result)
    (result / "config.json").write_text("{}")
    assert status(result)["state"] == "finished"


def test_the_command_line_shows_it(walk, capsys):
    from typer.testing import CliRunner

    from slimkit.cli import app

    done = CliRunner().invoke(app, ["status", str(walk)])
    assert done.exit_code == 0, done.exception
    assert "layers: 5 of 16" in done.output
    told = json.loads(CliRunner().invoke(app, ["status", str(walk), "--json"]).output)
    assert told["command"] == "status"
    assert told["go_on"] == own_command()


def test_a_command_of_torchrun_is_told_as_it_was_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/slimkit/__main__.py", "sparsify", "--out", "a b"])
    assert own_command() == "slimkit sparsify --out 'a b'"
    for key, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    assert own_command() == "torchrun --nnodes 2 --nproc-per-node 8 -m slimkit sparsify --out 'a b'"
    assert (crew.rank(), crew.size()) == (3, 16)


def test_a_recipe_is_finished_with_its_last_stage_and_names_what_goes_on(tmp_path):
    run = tmp_path / "a run"
    (run / "stages").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": {"name": "r", "stages": [{}, {}]}}))
    seen = []
    for name in ("00-load", "01-prune", "02-export"):  # the model as it was loaded is no stage
        (run / "stages" / name).mkdir()
        (run / "stages" / name / "stage.json").write_text("{}")
        seen.append((status(run)["done"]["stages"], status(run)["state"]))
    assert seen == [([0, 2], "stopped"), ([1, 2], "stopped"), ([2, 2], "finished")]
    (run / "stages" / "02-export" / "stage.json").unlink()
    assert status(run)["go_on"] == f"slimkit run '{run}/run.json' --output '{run}'"  # begun by an earlier version
    log = JobLog(run / "stages")
    log.begun("the recipe 'r'", processes=2)
    log.stopped(KeyboardInterrupt())
    found = status(run)
    assert (found["go_on"], found["why"], found["processes"]) == (own_command(), "KeyboardInterrupt", 2)


def test_what_goes_on_does_not_begin_anew(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slimkit", "run", "r.yaml", "--restart", "--output", "out"])
    assert own_command() == "slimkit run r.yaml --output out"
