"""Folders that commands write: what is copied along, what an unfinished and a finished one look like."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slimkit.core import files

# What a folder of a pruned model holds beside its weights: the plan, and the configuration before the cut.
PLAN, BASE = "plan.json", "base"

# What a folder of a sparse model says of its layers.
SPARSE_REPORT = "sparse_report.json"

# Where a training command keeps its checkpoints until the result is there.
STATE = ".slimkit-train"

# Where a walk block by block makes what will replace the files of its folder.
FORCED = ".slimkit-forced"

# Endings of files that hold weights.
WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".safetensors", ".ckpt", ".gguf", ".mindir")


def made_sparse(directory: Path) -> list[str]:
    """The layers that the report of `slimkit sparsify` or `sparsify_checkpoint` beside a model's weights names."""
    report = directory / SPARSE_REPORT
    found = files.read_json(report) if report.exists() else {}
    layers = found.get("layers") if isinstance(found, dict) else None
    return list(layers) if isinstance(layers, dict) else []


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what belongs to a model beside its weights (tokenizer, generation settings); what is there already stays.

    Returns:
        The names of the files copied.
    """
    copied = []
    for file in sorted(source.iterdir()):
        weights = file.suffix in WEIGHTS or file.name.endswith((".index.json", ".manifest.json"))
        ours = file.name in (PLAN, "config.json") or file.name.endswith("_report.json") or file.name.startswith(".")
        if file.is_file() and not weights and not ours and not (target / file.name).exists():
            with open(file, "rb") as old, files.atomic_file(target / file.name) as new:
                shutil.copyfileobj(old, new)
            copied.append(file.name)
    return copied


def write_report(folder: Path, command: str, facts: dict[str, Any]) -> None:
    """Write COMMAND_report.json: what a command did, for people and programs that come later."""
    report = {"format": f"slimkit-{command}", "version": 1, **files.finite(facts)}
    files.write_json(folder / f"{command}_report.json", report)
