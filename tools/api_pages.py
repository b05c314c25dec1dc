"""Pages of the API reference, one a room, from the table of public names; MkDocs calls `on_files` as a hook.

The pages hold mkdocstrings' directives, so that what is shown is the docstring itself. A name that both wings have is
shown from the PyTorch wing, whose source is read and never imported.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slimkit.core import public  # noqa: E402

_TITLES = {
    "prune": "Pruning", "sparse": "Sparsity", "distill": "Distillation", "delta": "Delta layers", "freeze": "Freezing",
    "checkpoint": "Checkpoints", "train": "Training", "export": "Export", "ascend": "Ascend",
    "calib": "Calibration",
}  # fmt: skip


def owner(name: str, home: str) -> str:
    """The dotted path of the file that defines a name, following re-exports.

    Args:
        name: a public name.
        home: where the table says it lives, for example "delta" or "core.errors".
    """
    package = "slimkit_ms" if public.ONLY.get(name, ("",))[0] == "slimkit_ms" else "slimkit"
    if home.startswith("core."):
        package = "slimkit"
    place = [package, *home.split(".")]
    for _ in range(5):
        found = _from(place, name)
        if found is None:
            return ".".join(place)
        place = found
    raise LookupError(f"{name} is passed on from file to file without end")


def _from(place: list[str], name: str) -> list[str] | None:
    """Where a file imports a name from; None when it defines the name itself."""
    folder = ROOT.joinpath(*place)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return node.module.split(".")
    return None


def page(room: str) -> str:
    """The Markdown of one room's page."""
    names = public.ROOMS[room] if room != "top" else public.TOP
    title = _TITLES.get(room, "Errors and logging")
    offered = f"`slimkit.{room}`" if room != "top" else "`slimkit`"
    lines = [
        f"# {title}",
        "",
        f"Every name here is offered by {offered} and by the package top, in `slimkit` (PyTorch) and `slimkit_ms` "
        "(MindSpore) alike unless a line says otherwise. [What differs](../differences.md).",
        "",
    ]
    for name in names:
        lines += [f"## {name}", ""]
        if name in public.ONLY:
            package, why = public.ONLY[name]
            lines += [f"In `{package}` alone: {why}.", ""]
        if name in ("PruneTorch", "PruneMindSpore"):
            lines += ["The same class as `Pruner`.", ""]
        elif (first := next(r for r in rooms() if name in (public.ROOMS.get(r) or public.TOP))) != room:
            lines += [f"See [{_TITLES[first]}]({first}.md).", ""]
        else:
            lines += [f"::: {owner(name, names[name])}.{'PruneTorch' if name == 'Pruner' else name}", ""]
    return "\n".join(lines)


def rooms() -> list[str]:
    """The pages there are."""
    return [*public.ROOMS, "top"]


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: add the pages to the site."""
    from mkdocs.structure.files import File

    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=page(room)))
    return files
