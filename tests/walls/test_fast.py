"""The inner loop's table names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fast import FAST

BOTH = Path(__file__).parents[1] / "both"


@pytest.mark.parametrize("file", sorted(FAST))
def test_the_table_names_a_test(file):
    tree = ast.parse((BOTH / file).read_text(encoding="utf-8"))
    assert FAST[file] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
