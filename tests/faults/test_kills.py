"""Two files, one truth: a writer of several files that is killed between any two calls leaves the old or the new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.killed import WRITERS

ROOT = Path(__file__).parents[2]
FOLDERS = ("bundle", "peft", "w16a16s", "whole_folder")
CASES = [*((name, True) for name in WRITERS), *((name, False) for name in FOLDERS)]


@pytest.mark.parametrize(("writer", "exchange"), CASES)
def test_a_killed_writer_leaves_the_old_files_or_the_new(writer, exchange):
    command = [sys.executable, "-m", "tests.faults.killed", writer, *([] if exchange else ["no-exchange"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    old, new = map(int, done.stdout.split())
    # Both were met: the kills came before the one rename that counts, and after it.
    assert old >= 3
    assert new >= 1
