"""The API reference: every public name has its place, and the file it is read from defines it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from slimkit.core import public

ROOT = Path(__file__).parents[2]


def pages():
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "tools" / "api_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {room: module.page(room) for room in module.rooms()}


def defined(dotted):
    """Whether the file of a dotted path defines its last part, a class or function that says what it is."""
    *place, name = dotted.split(".")
    folder = ROOT.joinpath(*place)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            # A wing's class may take its documentation from the core's, which the page shows with its members.
            return bool(ast.get_docstring(node) or getattr(node, "bases", ()))
    return False


def test_every_public_name_is_on_the_page_of_its_room():
    found = pages()
    for room, names in {**public.ROOMS, "top": public.TOP}.items():
        for name in names:
            assert f"## {name}\n" in found[room], f"{room} lacks {name}"
    shown = [
        line.removeprefix("::: ") for page in found.values() for line in page.splitlines() if line.startswith(":::")
    ]
    assert len(shown) == len(set(shown)), "a name shown twice has two addresses"
    for dotted in shown:
        assert defined(dotted), f"{dotted} is not defined there"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for room in pages():
        assert f"api/{room}.md" in nav
