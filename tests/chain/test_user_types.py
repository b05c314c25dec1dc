"""What a user's editor and type checker see: every public name has its type, and slips are found before the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimkit.core import public
from tests.conftest import INSTALLED

ROOT = Path(__file__).parents[2]
WINGS = {"torch": "slimkit", "mindspore": "slimkit_ms"}
MODEL = {"torch": "torch.nn.Linear(8, 8)", "mindspore": "mindspore.nn.Dense(8, 8)"}

# Each line holds one slip; what is beside it is right.
SLIPS = {
    "a method": "{p}.Pruner({m}, None).prnue(0.5)",
    "a name of the package": "{p}.Prunner({m})",
    "a keyword of a configuration": "{p}.SparseConfig(methd='par')",
    "a value's type": "{p}.SparseConfig(sparse_ratio='half')",
    "a keyword of a function": "{p}.apply_delta({m}, 'lora', rnak=8) + 1",
    "a keyword of a class": "{p}.Trainer({m}, loss_function=None)",
    "a missing argument": "{p}.save_delta({m})",
    "a path": "{p}.export_onnx({m}, None, 5)",
    "an attribute of a report": "{p}.merge_delta({m}).matchd",
    "an exception": "{p}.SlimkitEror",
    "a method of a configuration": "{p}.KnowledgeDistillConfig().set_hard_labl(0.5)",
    "a callback": "{p}.EarlyStopping('loss', patience='two')",
}


def _script(folder: Path, framework: str) -> tuple[Path, dict[int, str]]:
    package = WINGS[framework]
    lines = [f"import {framework}", f"import {package}"]
    lines += [f"reveal_type({package}.{name})" for name in sorted(public.homes(package))]
    at = {}
    for what, line in SLIPS.items():
        lines.append(line.format(p=package, m=MODEL[framework]))
        at[len(lines)] = what
    file = folder / f"user_{framework}.py"
    file.write_text("\n".join(lines) + "\n")
    return file, at


@pytest.mark.parametrize("package", WINGS.values())
def test_the_stub_is_the_table_of_public_names(package):
    held = (ROOT / package / "__init__.pyi").read_text(encoding="utf-8")
    assert held == public.stub(package), "run: python tools/stubs.py"


def _scripts(folder: Path) -> tuple[list[str], dict[tuple[str, int], str]]:
    """One script a framework; (file, line) -> the slip that stands there."""
    files, slips = [], {}
    for framework in INSTALLED:
        file, at = _script(folder, framework)
        files.append(file.name)
        slips |= {(file.name, line): f"{what} ({framework})" for line, what in at.items()}
    return files, slips


def test_pyright_knows_every_name_and_finds_each_slip(tmp_path):
    pytest.importorskip("basedpyright")
    files, slips = _scripts(tmp_path)
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    asked = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, *files]
    run = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = {(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found if d["severity"] == "error"}
    assert [what for place, what in slips.items() if place not in errors] == []
    assert sorted(errors - set(slips)) == [], found
    revealed = [d["message"] for d in found if d["severity"] == "information"]
    assert len(revealed) == sum(len(public.homes(WINGS[framework])) for framework in INSTALLED)
    assert [m for m in revealed if re.search(r'is "(Any|Unknown)"', m)] == []


def test_mypy_finds_each_slip(tmp_path):
    pytest.importorskip("mypy")
    files, slips = _scripts(tmp_path)
    config = tmp_path / "mypy.ini"
    # The frameworks are not followed: torch alone takes minutes, and what is looked for is slimkit's.
    config.write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-slimkit.*,slimkit_ms.*]\nfollow_imports = silent\n"
        "[mypy-torch.*,mindspore.*,transformers.*,accelerate.*]\nfollow_imports = skip\n"
    )
    asked = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache"), *files]
    run = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)})
    found = re.findall(r"^(user_\w+\.py):(\d+): error", run.stdout, re.MULTILINE)
    errors = {(file, int(line)) for file, line in found}
    assert [what for place, what in slips.items() if place not in errors] == [], run.stdout[-2000:]
    assert sorted(errors - set(slips)) == [], run.stdout


@pytest.mark.parametrize("framework", INSTALLED)
def test_an_editor_completes_names_and_methods(framework):
    jedi = pytest.importorskip("jedi")
    package = WINGS[framework]
    project = jedi.Project(ROOT)
    top = jedi.Script(f"import {package}\n{package}.Prun", project=project).complete()
    assert {"Pruner", "PruneConfig"} <= {c.name for c in top}
    methods = jedi.Script(f"from {package} import Pruner\nPruner(None, None).", project=project).complete()
    assert {"prune", "set_importance_evaluation_function", "report"} <= {c.name for c in methods}
