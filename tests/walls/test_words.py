"""One class name, one class; no file imports itself around a corner."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
    for wing in ("slimkit", "slimkit_ms")
    for f in sorted((ROOT / wing).rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}
SIDES = {
    "slimkit": [m for m in FILES if m.split(".")[0] == "slimkit"],
    "slimkit_ms": [m for m in FILES if m.split(".")[0] == "slimkit_ms" or m.startswith("slimkit.core")],
}


@pytest.mark.parametrize("wing", SIDES)
def test_a_class_name_stands_once_in_a_wing_and_the_core(wing):
    places = defaultdict(list)
    for module in SIDES[wing]:
        for node in TREES[module].body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not twice, f"one name for several things: {twice}"
    assert len(places) > 100, "the tree was not found"


def imported(module: str) -> set[str]:
    """The files of this project that a file imports anywhere in it, also inside functions and for types."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return (found & set(FILES)) - {module}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """A way back to itself for each file that has one, by repeatedly removing what imports nothing that is left."""
    left = {module: set(targets) for module, targets in edges.items()}
    while ends := [m for m, targets in left.items() if not targets]:
        for end in ends:
            del left[end]
        for targets in left.values():
            targets.difference_update(ends)
    return [[module, *sorted(targets)] for module, targets in left.items()]


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert {row[0] for row in circles({"a": {"b"}, "b": {"a"}, "c": {"a"}})} == {"a", "b", "c"}


def test_no_circle_of_imports_between_files():
    found = circles({module: imported(module) for module in FILES})
    assert not found, f"files that import one another (or what does): {found}"
