"""The model card of a folder that a command writes: what was done, by which command, what it gave, how to load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.errors import FileFormatError
from slimkit.core.jobs.fields import Strict, flag_of
from slimkit.core.jobs.framework import Opened
from slimkit.core.jobs.measurement import show
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.jobs.sources import ModelPlace
from slimkit.core.yamltext import parse_yaml

CARD = "README.md"
# What a base model's card says that holds for what is made of it.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")

_LOADING = {
    "transformers": """```python
from transformers import {kind}

model = {kind}.from_pretrained("this folder")
```

slimkit is not needed. The folder was read again that way when it was written, and answered as before.""",
    "slimkit": "`load_pruned` of slimkit and its commands read the folder; no configuration can say these shapes.",
    "weights": "The file holds the weights of the factory's network: `load_checkpoint` of slimkit reads it.",
}


def command_line(command: str, place: ModelPlace, options: Strict) -> str:
    """The command that a person would give for these options, defaults left out.

    Args:
        command: its name.
        place: the model.
        options: of the job.
    """
    words = ["slimkit", command]
    words += ["--model", place.model.name or str(place.model)] if place.model is not None else []
    words += ["--factory", place.factory] if place.factory is not None else []
    for key, field in type(options).model_fields.items():
        value, flag = getattr(options, key), flag_of(type(options), key)
        if not flag.names or value == field.default:
            continue
        if flag.sets is not None:
            words.append(flag.names[0])
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            words += [flag.names[0], str(item)]
    return shlex.join(words)


def pruned_facts(facts: Mapping[str, Any], options: PruneOptions) -> dict[str, str]:
    """The numbers of a pruning, for people."""
    report = facts["report"]
    rows = {
        "parameters": f"{show(facts['parameters'], 'count')} of {show(facts['parameters_before'], 'count')}",
        f"kept, of the {report['budget']}": f"{report['reached']:.3f} ({options.reserved_ratio} asked for)",
        "form": report["form"]["name"],
        "importance": options.importance,
    }
    if facts.get("reloaded") is not None:
        rows["largest difference after loading"] = f"{facts['reloaded']:.2g}"
    return rows


def write_card(folder: Path, tag: str, opened: Opened, command: str, rows: Mapping[str, str], written: str) -> None:
    """Write README.md; what the base model's card says of its licence and language is kept.

    Args:
        folder: is being filled.
        tag: what was done, one word.
        opened: the model.
        command: as a person would give it.
        rows: numbers, by name.
        written: what reads the folder, as `JobFramework.write_model` says it.
    """
    source = opened.directory
    base = {} if source is None else _front(source / CARD)
    name = _name(source)
    front: dict[str, Any] = {key: base[key] for key in _KEPT if key in base}
    if written == "transformers":
        front["library_name"] = "transformers"
    if name:
        front["base_model"] = name
    front["tags"] = ["slimkit", tag]
    kind = type(opened.model).__name__
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    licence = "" if "license" in front or not name else "\nThe base model's licence applies; its card names none.\n"
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    text = (
        f"---\n{head}\n---\n\n# {name or kind}, {tag}\n\nMade with:\n\n```bash\n{command}\n```\n\n"
        f"| | |\n|---|---|\n{table}\n{licence}\n## Load it\n\n{_LOADING[written].format(kind=kind)}\n"
    )
    with files.atomic_file(folder / CARD, "w") as handle:
        handle.write(text)


def _name(source: Path | None) -> str:
    """What the base model calls itself: as its configuration says, or its folder's name."""
    if source is None:
        return ""
    config = source / "config.json"
    told = files.read_json(config) if config.exists() else {}
    named = told.get("_name_or_path") if isinstance(told, dict) else None
    return named if isinstance(named, str) and named and not Path(named).is_absolute() else source.resolve().name


def _front(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    if not card.is_file():
        return {}
    begin, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    head, end, _ = rest.partition("\n---")
    if begin.strip() or not end:
        return {}
    try:
        found = parse_yaml(head)
    except FileFormatError:
        return {}
    return found if isinstance(found, dict) else {}
