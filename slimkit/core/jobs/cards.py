"""The model card of a folder that a command writes: what was done, by which command, what it gave, how to load it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.calibration import OWN
from slimkit.core.errors import FileFormatError
from slimkit.core.jobs.fields import EVERY, Strict, flag_of, words_of
from slimkit.core.jobs.framework import Opened
from slimkit.core.jobs.measurement import show
from slimkit.core.jobs.options import PruneOptions
from slimkit.core.jobs.sources import TEXT_ENDINGS, DataPlace, ModelPlace, StudentPlace
from slimkit.core.jobs.timing import told
from slimkit.core.yamltext import parse_yaml

CARD = "README.md"
# The block that a layer is in: the path up to its first number.
_BLOCK = re.compile(r"^(.*?\.\d+)\.")
# What a base model's card says that holds for what is made of it.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")

_LOADING = {
    "transformers": """```python
from transformers import {kind}

model = {kind}.from_pretrained("this folder")
```

slimkit is not needed.""",
    "slimkit": "`load_pruned` of slimkit and its commands read the folder; no configuration can say these shapes.",
    "delta": """```python
from slimkit import load_delta

load_delta(model, "this folder")  # the base model, as it was
```

A model of MindSpore takes it by `slimkit_ms.load_delta`.""",
    "peft": """```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder")  # the base model, as it was
```

`load_delta` of slimkit reads it too.""",
    "weights": "The file holds the weights of the factory's network: `load_checkpoint` of slimkit reads it.",
}


def command_line(command: str, place: ModelPlace, options: Strict, more: Mapping[str, Any] | None = None) -> str:
    """The command that a person would give for these options, defaults left out.

    Args:
        command: its name.
        place: the model.
        options: of the job.
        more: flag -> value of what the command was given beside them; None and empty lists are left out.
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
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        if not isinstance(value, bool):
            words += _said(flag.names[0], pairs)
        elif words_of(type(options), key) is not None:  # true and false are words beside others
            words += _said(flag.names[0], str(value).lower())
        else:
            words.append(flag.names[0] if value else flag.names[0].replace("--", "--no-", 1))
    for name, value in (more or {}).items():
        words += [] if value is None else _said(name, value)
    return shlex.join(words)


def _said(name: str, value: Any) -> list[str]:
    """A flag and its value; a list gives the flag once an item."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [word for item in items for word in (name, Path(item).name if isinstance(item, Path) else str(item))]


def data_flags(data: DataPlace | None, option: str = "--calib", seed: int = 0) -> dict[str, Any]:
    """The options of a command line that say which data was read, how much of it, and the seed.

    Args:
        data: the data; the files need not be there any more.
        option: what names it; the batches of training data are an option of the job.
        seed: of what is drawn without data.
    """
    if data is None:
        return {"--seed": seed or None}
    places = (data, *data.more)
    text = data.reference == OWN or Path(data.reference).suffix in TEXT_ENDINGS
    return {
        option: [p.reference + ("" if p.weight == 1.0 else f"={p.weight:g}") for p in places],
        "--text-key": data.text_key if text and data.text_key != "text" else None,
        "--samples": data.samples if data.samples < EVERY else None,
        "--max-length": data.max_length if text else None,
        "--batch-size": data.batch_size if option == "--calib" else None,
        "--seed": seed or data.seed or None,
    }


def student_flags(student: StudentPlace) -> dict[str, Any]:
    """The options of a command line that say which student was trained."""
    made: dict[str, Any] = {f"--{key}": value for key, value in student.sizes.items()}
    made["--layer-map"] = None if student.layer_map is None else ",".join(map(str, student.layer_map))
    made["--selection"] = None if student.selection == "importance" else student.selection
    made["--teacher"] = None if student.teacher == "auto" else student.teacher
    if (place := student.place) is not None:
        made |= {"--student": place.model, "--student-factory": place.factory}
        made["--student-arg"] = [f"{key}={value}" for key, value in place.arguments.items()]
    return made


def sparse_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a sparsity run, for people."""
    rows = {
        "zeros": f"{report['zeros']:,} of {report['weights']:,} weights of {len(report['layers'])} layers",
        "method": ", ".join(dict.fromkeys(row["method"] for row in report["layers"].values())),
    }
    if worst := worst_layers(report, 1):
        rows["largest output error of a layer"] = f"{worst[0][1]:.4f} ({worst[0][0]})"
    return rows


def worst_layers(report: Mapping[str, Any], count: int) -> list[tuple[str, float]]:
    """The layers whose outputs changed most, in shares of the outputs' own size; empty without calibration data."""
    found = [(n, float(row["output_error"])) for n, row in report["layers"].items() if "output_error" in row]
    return sorted(found, key=lambda pair: -pair[1])[:count]


def errors_by_block(report: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(Block, mean, largest) of the layers' output errors, in the model's order.

    Example:
        >>> errors_by_block({"layers": {"h.0.q": {"output_error": 0.25}, "h.0.k": {"output_error": 0.75}}})
        [('h.0', 0.5, 0.75)]
    """
    blocks: dict[str, list[float]] = {}
    for name, error in worst_layers(report, len(report["layers"])):
        found = _BLOCK.match(name)
        if found:
            blocks.setdefault(found[1], []).append(error)
    order = {found[1]: at for at, name in enumerate(report["layers"]) if (found := _BLOCK.match(name))}
    return [(b, sum(e) / len(e), max(e)) for b, e in sorted(blocks.items(), key=lambda pair: order[pair[0]])]


def trained_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a training run, for people."""
    rows = {"task": str(facts["task"]), "samples": f"{facts['samples']:,}", "updates": str(facts["steps"])}
    if "trained_parameters" in facts:
        rows["trained"] = f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters"
    if facts["loss_by_epoch"]:
        rows["loss of the last epoch"] = f"{facts['loss_by_epoch'][-1]:.4g}"
    return rows | {f"held-out {name}": f"{value:.4g}" for name, value in facts.get("evaluation", {}).items()}


def distilled_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a distillation, for people."""
    small, large = facts["parameters"], facts["teacher_parameters"]
    rows = {"parameters": f"{show(small, 'count')} of the teacher's {show(large, 'count')}"}
    rows |= {"samples": f"{facts['samples']:,}", "updates": str(facts["steps"])}
    if facts["loss_by_epoch"]:
        rows["loss of the last epoch"] = f"{facts['loss_by_epoch'][-1]:.4g}"
    return rows


def pruned_facts(facts: Mapping[str, Any], options: PruneOptions) -> dict[str, str]:
    """The numbers of a pruning, for people."""
    report = facts["report"]
    rows = {
        "parameters": f"{show(facts['parameters'], 'count')} of {show(facts['parameters_before'], 'count')}",
        f"kept, of the {report['budget']}": f"{report['reached']:.3f} ({options.reserved_ratio} asked for)",
        "form": report["form"]["name"],
        "importance": options.importance,
    }
    if "latency" in report:
        rows["latency"] = told(report["latency"])
    if "padding" in report:
        rows["zeros that pad blocks to one width"] = show(report["padding"]["zeros"], "count")
    if facts.get("reloaded") is not None:
        rows["largest difference after loading"] = f"{facts['reloaded']:.2g}"
    return rows


def write_card(folder: Path, tag: str, opened: Opened, command: str, rows: Mapping[str, str], written: str) -> None:
    """Write README.md of a model in memory, as `write_card_of` does."""
    kind = type(opened.model).__name__
    write_card_of(folder, tag, opened.directory, kind, command, rows, written)


def write_card_of(
    folder: Path, tag: str, source: Path | None, kind: str, command: str, rows: Mapping[str, str], written: str
) -> None:
    """Write README.md; what the base model's card says of its licence and language is kept.

    Args:
        folder: is being filled.
        tag: what was done, one word.
        source: the base model's folder, where it has one.
        kind: the model's class.
        command: as a person would give it.
        rows: numbers, by name.
        written: what reads the folder, as `JobFramework.write_model` says it, or "delta" or "peft".
    """
    base = {} if source is None else _front(source / CARD)
    told = base.get("base_model")
    name = told if isinstance(told, str) and told else _name(source)
    front: dict[str, Any] = {key: base[key] for key in _KEPT if key in base}
    if written == "transformers":
        front["library_name"] = "transformers"
    if name:
        front["base_model"] = name
    front["tags"] = ["slimkit", tag]
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
