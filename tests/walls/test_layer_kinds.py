"""What kind of layer a module is has one answer in each framework: its kinds.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Files that ask for a class that kinds.py lists, and what else than its kind they want to know.
OTHERWISE = {
    "slimkit/surgery.py": "which attributes of torch's own classes repeat the sizes of their weights",
    "slimkit/delta/framework.py": "why a layer of a known kind takes no delta",
    "slimkit/delta/prompt_model.py": "token tables, as torch's own class looks them up",
    "slimkit/delta/positions.py": "position tables, as torch's own class looks them up",
    "slimkit_ms/proof.py": "nn.LayerNorm alone, whose statistics can be taken over kept features",
    "slimkit_ms/surgery/layers.py": "which attributes of MindSpore's own recurrent classes repeat sizes",
}


def trees(wing: str) -> dict[str, ast.Module]:
    files = [f for f in sorted((ROOT / wing).rglob("*.py")) if "core" not in f.relative_to(ROOT).parts]
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text(encoding="utf-8")) for f in files}


def listed(wing: str) -> set[str]:
    """The names of the classes in a wing's KINDS."""
    for node in trees(wing)[f"{wing}/kinds.py"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and node.target.id == "KINDS":
            return {key.attr for key in node.value.keys}
    raise AssertionError("no KINDS")


def asked(tree: ast.Module, classes: set[str]) -> set[str]:
    """Listed classes that a file compares a module's class with: by isinstance, issubclass, `is` or `==`."""
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            found |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
        elif isinstance(node, ast.Compare):
            found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return found & classes


def test_asking_is_seen():
    tree = ast.parse("isinstance(m, (nn.Linear, nn.ReLU)); type(m) is nn.Conv2d; nn.Embedding(2, 3)")
    assert asked(tree, {"Linear", "Conv2d", "Embedding"}) == {"Linear", "Conv2d"}


@pytest.mark.parametrize("wing", ["slimkit", "slimkit_ms"])
def test_only_kinds_asks_what_kind_of_layer_a_module_is(wing):
    classes = listed(wing)
    assert len(classes) > 10
    found = {file: asked(tree, classes) for file, tree in trees(wing).items()}
    found = {file: names for file, names in found.items() if names and not file.endswith("/kinds.py")}
    wanted = {file for file in OTHERWISE if file.startswith(f"{wing}/")}
    assert set(found) == wanted, f"ask kinds.py, or say here why not: {found}"
