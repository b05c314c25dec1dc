"""The inner loop's table names tests that there are, and the order of files names files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fast import FAST
from tests.order import LONGEST, longest_first

BOTH = Path(__file__).parents[1] / "both"


@pytest.mark.parametrize("file", sorted(FAST))
def test_the_table_names_a_test(file):
    tree = ast.parse((BOTH / file).read_text(encoding="utf-8"))
    assert FAST[file] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", LONGEST)
def test_the_order_names_a_file(file):
    assert (BOTH.parent / file).is_file()


def test_files_that_take_long_come_first_and_each_stays_together():
    files = ["core/a.py", "core/b.py", LONGEST[1], "core/b.py", LONGEST[0], LONGEST[1]]
    order = longest_first(files)
    assert sorted(order) == list(range(6))
    assert [files[at] for at in order] == [LONGEST[0], LONGEST[1], LONGEST[1], "core/b.py", "core/b.py", "core/a.py"]
    assert order[1:3] == [2, 5]  # the tests of a file as they were
