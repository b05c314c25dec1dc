"""`slimkit run` when things go wrong: one clear message, exit code 2, nothing half written, and a run that resumes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "tools" / "recipes" / "digits.yaml"
# Few digits, one epoch per stage: the point is what survives, not the accuracy.
SMALL = [
    "model={factory: digits.py:build, arguments: {width: 16}}",
    "data={factory: digits.py:data, arguments: {limit: 128}}",
    "stages.0.train.epochs=1",
    "stages.2.finetune.epochs=1",
]
QUICK = [x for pair in SMALL for x in ("--set", pair)]


def slimkit(*arguments, cwd, file_limit=None, wait=True):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    process = subprocess.Popen(
        [sys.executable, "-m", "slimkit", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        preexec_fn=limit if file_limit else None,
    )  # fmt: skip
    if not wait:
        return process
    process.out, process.err = process.communicate(timeout=300)
    return process


def stage_folders(run):
    return sorted(p.name for p in (run / "stages").iterdir() if p.is_dir()) if (run / "stages").exists() else []


RECIPE = """
    version: 1
    name: x
    model: task.py:model
    data: task.py:data
    stages:
      - prune: {reserved_ratio: 0.5}
"""
TASK = """
    def model():
        raise RuntimeError("the weights are elsewhere")
    def data():
        return {"train": [1], "example": 1}
"""


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE.replace("0.5}", "0.5, alignmnet: 8}"), "stages[0].prune.alignmnet: unknown key. Did you mean"),
        (RECIPE.replace("task.py:model", "tusk.py:model"), "model: factory file must be an existing file"),
        (RECIPE.replace("task.py:data", "task.py:dota"), "data: task.py has no function 'dota'. Did you mean 'data'"),
        (RECIPE, "model: task.py:model raised RuntimeError: the weights are elsewhere"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_a_wrong_recipe_ends_in_one_message(tmp_path, recipe, message):
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(recipe))
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))
    done = slimkit("run", "recipe.yaml", "--quiet", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert stage_folders(tmp_path / "runs" / "x") == []


def test_a_missing_recipe_ends_in_one_message(tmp_path):
    done = slimkit("run", "missing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "missing.yaml" in done.err
    assert list(tmp_path.iterdir()) == []


def test_version_check_and_bad_overrides(tmp_path):
    assert slimkit("--version", cwd=tmp_path).out.startswith("slimkit ")
    assert "nothing wrong" in slimkit("run", DIGITS, "--check", cwd=tmp_path).out
    for pair in ("seed", "stages.9.train.epochs=1", "seed=[", "seed=minus"):
        done = slimkit("run", DIGITS, "--check", "--set", pair, cwd=tmp_path)
        assert done.returncode == 2, pair
        assert "Traceback" not in done.err


def numbers(run):
    stages = json.loads((run / "report.json").read_text())["stages"]
    return [(s["name"], s["digest"], s["metrics"], s["measurement"]["parameters"]) for s in stages]


@pytest.mark.slow
def test_a_full_disk_and_a_kill_leave_a_run_that_resumes_to_the_same_numbers(tmp_path):
    whole = slimkit("run", DIGITS, *QUICK, "-o", "whole", "--json", cwd=tmp_path)
    assert whole.returncode == 0, whole.err
    assert json.loads(whole.out)["report"] == "whole/report.html"

    # A file may not grow beyond 64 kB: the first stage's weights do not fit, as on a full disk.
    full = slimkit("run", DIGITS, *QUICK, "-o", "run", "--quiet", cwd=tmp_path, file_limit=64 << 10)
    assert full.returncode == 2, full.err
    assert "File too large" in full.err
    assert "Traceback" not in full.err
    assert [n for n in stage_folders(tmp_path / "run") if not n.startswith("00")] == []

    killed = slimkit("run", DIGITS, *QUICK, "-o", "run", cwd=tmp_path, wait=False)
    end = time.monotonic() + 120
    while "02-prune" not in stage_folders(tmp_path / "run") and time.monotonic() < end and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = [n for n in stage_folders(tmp_path / "run") if not n.startswith(".")]
    assert "02-prune" in left
    assert "06-export" not in left

    resumed = slimkit("run", DIGITS, *QUICK, "-o", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.err
    assert "02-prune: already done" in resumed.err
    assert "Report: run/report.html" in resumed.out
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")

    other = slimkit("run", DIGITS, *QUICK, "-o", "run", "--set", "seed=1", cwd=tmp_path)
    assert other.returncode == 2
    assert "first difference: seed" in other.err
