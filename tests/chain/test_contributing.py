"""The walk-throughs of CONTRIBUTING.md, performed in a copy of the tree: files, patches, and the check at the end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INSTALLED

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^### \((\w)\) ([^\n]+)\n(.*?)(?=^### |^## )", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = {letter: body for letter, _, body in SECTION.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))}

pytestmark = pytest.mark.skipif("torch" not in INSTALLED, reason="the checks run PyTorch's wing")


def hunks(patch: str) -> list[tuple[str, str, str]]:
    """(file, lines before, lines after) of each piece of a patch; line numbers in it do not count."""
    found, file = [], ""
    for part in re.split(r"^(?=--- |@@ )", patch, flags=re.MULTILINE):
        if part.startswith("--- "):
            file = part.splitlines()[0].removeprefix("--- a/")
        elif part.startswith("@@ "):
            lines = part.splitlines(keepends=True)[1:]
            before = "".join(line[1:] for line in lines if line[0] in " -")
            found.append((file, before, "".join(line[1:] for line in lines if line[0] in " +")))
    return found


def perform(body: str, tree: Path) -> str:
    """Do what a section says; returns its check."""
    check = ""
    for language, file, text in FENCE.findall(body):
        if file:
            assert not (tree / file).exists(), f"{file} is there already"
            (tree / file).write_text(text, encoding="utf-8")
        elif language == "diff":
            for place, before, after in hunks(text):
                source = (tree / place).read_text(encoding="utf-8")
                assert source.count(before) == 1, f"{place} does not hold this once any more:\n{before}"
                (tree / place).write_text(source.replace(before, after), encoding="utf-8")
        elif language == "python":
            check += text
    return check


def test_the_page_has_all_six():
    assert list(SECTIONS) == list("abcdef")


@pytest.mark.parametrize("letter", SECTIONS)
def test_a_walk_through_works(letter, tmp_path):
    for wing in ("slimkit", "slimkit_ms"):
        shutil.copytree(ROOT / wing, tmp_path / wing, ignore=shutil.ignore_patterns("__pycache__"))
    check = perform(SECTIONS[letter], tmp_path)
    assert check, "a walk-through ends with a check"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", f"import slimkit\nassert slimkit.__file__.startswith({str(tmp_path)!r})\n{check}"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
