"""The import walls of docs/architecture.md, read from the source and tried in fresh processes."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slimkit.core import public

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "slimkit" / "core").rglob("*.py"))
TORCH = sorted(f for f in (ROOT / "slimkit").rglob("*.py") if "core" not in f.relative_to(ROOT / "slimkit").parts)
MS = sorted((ROOT / "slimkit_ms").rglob("*.py"))
FEATURES = {
    "prune",
    "weights",
    "sparse",
    "distill",
    "delta",
    "checkpoint",
    "train",
    "export",
    "convert",
    "compare",
    "calib",
}
LOWER = {"trace", "surgery", "freeze", "bridge", "measurement", "kinds", "attention"}
# Base requirements that only some core files need, each imported at the top of files nobody imports for less.
CORE_TOP = {"numpy", "slimkit"}
CORE_TOP_FILES = {
    "recipe.py": {"pydantic", "pydantic_core"},
    "factory.py": {"pydantic"},
    "fields.py": {"pydantic", "pydantic_core"},
    "options.py": {"pydantic", "pydantic_core"},
    "training_options.py": {"pydantic", "pydantic_core"},
    "command_options.py": {"pydantic"},
}


def imports(file: Path) -> list[tuple[str, bool]]:
    """Every module a file imports, and whether at the top (run on import; not under TYPE_CHECKING)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((a.name, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parts, base]).rstrip(".")
            found.extend((f"{base}.{a.name}", top) for a in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, True)
    return found


def room(module: str) -> str:
    """slimkit.delta.lora -> delta; slimkit -> ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("file", CORE, ids=lambda f: str(f.relative_to(ROOT)))
def test_core_knows_no_framework(file):
    allowed_top = CORE_TOP | CORE_TOP_FILES.get(file.name, set()) | set(sys.stdlib_module_names)
    for module, top in imports(file):
        root = module.split(".")[0]
        assert root not in {"torch", "mindspore", "slimkit_ms", "transformers", "accelerate"}, f"imports {module}"
        if root == "slimkit":
            assert module == "slimkit.core" or module.startswith("slimkit.core."), f"core imports a wing: {module}"
        if top:
            assert root in allowed_top, f"{module} must be imported inside the function that needs it"


@pytest.mark.parametrize("file", TORCH, ids=lambda f: str(f.relative_to(ROOT)))
def test_torch_wing_never_imports_mindspore(file):
    for module, _ in imports(file):
        assert module.split(".")[0] not in {"mindspore", "slimkit_ms"}, f"imports {module}"


@pytest.mark.parametrize("file", MS, ids=lambda f: str(f.relative_to(ROOT)))
def test_mindspore_wing_never_imports_torch(file):
    for module, top in imports(file):
        root = module.split(".")[0]
        if root == "torch":
            assert not top, "torch may be imported inside a function of convert only"
            assert file.name == "convert.py"
        if root == "slimkit":
            assert module == "slimkit.core" or module.startswith("slimkit.core."), f"imports a torch room: {module}"


@pytest.mark.parametrize("file", [*TORCH, *MS], ids=lambda f: str(f.relative_to(ROOT)))
def test_rooms_of_a_wing_import_downwards(file):
    wing = file.relative_to(ROOT).parts[0]
    own = file.relative_to(ROOT / wing).parts[0].removesuffix(".py")
    for module, _ in imports(file):
        if module.split(".")[0] != wing:
            continue
        other = room(module)
        if own in FEATURES:
            assert other == own or other not in FEATURES, f"feature {own} imports feature {other}"
        if own in LOWER:
            assert other not in FEATURES, f"{own} imports upwards: {other}"
        if own == "bridge":
            assert other in {"core", "bridge", "kinds"}, f"bridge imports {module}"
        if own == "kinds":
            assert other in {"core", "kinds"}, f"kinds imports {module}"
        if own in {"__init__", "cli", "__main__"} and own != "cli":
            assert other in {"core", "cli", ""}, f"{own} imports {module}"


@pytest.mark.parametrize("file", sorted((ROOT / "slimkit" / "cli").glob("*.py")), ids=lambda f: f.name)
def test_cli_imports_wings_only_inside_functions(file):
    for module, top in imports(file):
        root = module.split(".")[0]
        assert root not in {"torch", "mindspore", "transformers"}, f"the command line asks a wing: {module}"
        if top:
            assert root in {"typer", "slimkit", *sys.stdlib_module_names}, f"loaded by every command: {module}"
        if top and root == "slimkit":
            assert module.startswith(("slimkit.core.", "slimkit.cli"))


def fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_importing_both_packages_loads_no_framework_and_no_numpy():
    done = fresh(
        """
        import sys
        import slimkit, slimkit_ms, slimkit.cli
        print(sorted({"torch", "mindspore", "numpy", "scipy", "pydantic", "yaml", "matplotlib"} & set(sys.modules)))
        """
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("package", ["slimkit", "slimkit_ms"])
def test_a_missing_framework_gives_one_helpful_line(package):
    framework, extra = {"slimkit": ("torch", "slimkit[torch]"), "slimkit_ms": ("mindspore", "slimkit[mindspore]")}[
        package
    ]
    rooms = sorted({h for h in public.homes(package).values() if not h.startswith("core.")} | {"bridge", "jobs"})
    done = fresh(
        f"""
        import importlib, importlib.abc, importlib.machinery, importlib.util, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {framework!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == {framework!r} else real(name, *a)
        sys.meta_path.insert(0, Blocked())
        import {package}
        for room in {rooms!r}:
            try:
                importlib.import_module("{package}." + room)
            except ImportError as error:
                assert {extra!r} in str(error) and "\\n" not in str(error), (room, str(error))
            else:
                raise AssertionError(room + " imported without its framework")
        try:
            {package}.Trainer
        except ImportError as error:
            print(error)
        """
    )
    assert extra in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["slimkit", "slimkit_ms"])
def test_one_wing_works_without_the_other_framework(package):
    own, other = ("torch", "mindspore") if package == "slimkit" else ("mindspore", "torch")
    if importlib.util.find_spec(own) is None:
        assert package  # nothing to load here; the wing's own framework is not installed
        return
    rooms = sorted({h for h in public.homes(package).values() if not h.startswith("core.")} | {"jobs"})
    done = fresh(
        f"""
        import importlib, sys
        sys.modules[{other!r}] = None
        for room in {rooms!r}:
            importlib.import_module("{package}." + room)
        print("alive")
        """
    )
    assert done.stdout.strip().endswith("alive"), done.stdout + done.stderr
