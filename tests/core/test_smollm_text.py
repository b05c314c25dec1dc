"""The text of the language model's recipe: split by document and by kind, the same on every run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "recipes" / "smollm_text.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("smollm_text", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "smollm_text", module)
    spec.loader.exec_module(module)
    shared = "This paragraph stands in every single document of the collection. " * 3
    monkeypatch.setattr(module, "_descriptions", list)
    monkeypatch.setattr(module, "_licences", lambda: [("licence", "licence:one", shared)])

    def docstrings():
        for kind in ("manual", module.OTHER_KIND):
            for n in range(40):
                own = "\n\n".join(f"Sentence {k} of document {n} of kind {kind} says this much." * 3 for k in range(8))
                yield kind, f"{kind}:{n}", f"{shared}\n\n{own}"

    monkeypatch.setattr(module, "_docstrings", docstrings)
    return module


def test_no_document_and_no_paragraph_is_in_two_parts(tool, tmp_path):
    counts = tool.write_texts(tmp_path / "a")
    parts = {p: [json.loads(x) for x in (tmp_path / "a" / f"{p}.jsonl").read_text().splitlines()] for p in tool.PARTS}
    assert all(parts[p] and len(parts[p]) == counts[p]["documents"] for p in tool.PARTS)
    names = [d["name"] for lines in parts.values() for d in lines]
    paragraphs = [q for lines in parts.values() for d in lines for q in d["text"].split("\n\n")]
    assert len(names) == len(set(names))
    # A document is cut at its longest length, so the last paragraph of one may be a part of a sentence.
    assert len(paragraphs) - len(set(paragraphs)) <= sum(
        len(d["text"]) == tool.LONGEST for p in parts.values() for d in p
    )
    assert {d["kind"] for d in parts["other"]} == {tool.OTHER_KIND}
    assert tool.OTHER_KIND not in {d["kind"] for p in tool.PARTS[:3] for d in parts[p]}
    tool.write_texts(tmp_path / "b")
    for part in tool.PARTS:
        assert (tmp_path / "a" / f"{part}.jsonl").read_bytes() == (tmp_path / "b" / f"{part}.jsonl").read_bytes()


def test_a_document_more_moves_no_other(tool, monkeypatch):
    before = {d.name: d.part for d in tool.documents()}
    found = list(tool._docstrings())
    monkeypatch.setattr(tool, "_docstrings", lambda: [("manual", "manual:new", "New words. " * 100), *found])
    after = {d.name: d.part for d in tool.documents()}
    assert "manual:new" in after
    assert {n: p for n, p in after.items() if n != "manual:new"} == before


def test_examples_tables_and_markup_are_no_prose(tool):
    text = (
        "One.\n\n>>> f(1)\n1\n\n| a | b |\n----\n```python\nx = 1\n```\n[Two](http://a.b) ![c](d).\n:target: http://x\n"
    )
    assert tool._prose(text).split() == ["One.", "Two", "."]
