"""The tables of options in the documentation, written from the options themselves.

`python -m slimkit.core.jobs.pages docs/run.md docs/cli.md` brings the pages up to date; a test holds them to it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from slimkit.core.jobs.command_options import COMMAND_JOBS
from slimkit.core.jobs.fields import Strict, flag_of, words_of
from slimkit.core.jobs.options import JOBS, CalibrateOptions, EvaluateOptions, FitOptions

# What a recipe says of text, beside its jobs.
_TEXT: dict[str, type[Strict]] = {"calibrate": CalibrateOptions, "evaluate": EvaluateOptions}
# <!-- options JOB recipe|command --> ... <!-- end -->; JOB "fit" is what all jobs that train share.
_BLOCK = re.compile(r"(<!-- options (\w+) (recipe|command) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(job: str, door: str) -> str:
    """The options of a job as a table of Markdown.

    Args:
        job: a job, or "fit" for what all jobs that train share; a job's table then leaves out what is the same there.
        door: "recipe" (keys) or "command" (flags).

    Example:
        >>> table("cut", "recipe").splitlines()[2]
        '| `arguments` | required | keyword arguments of the model factory that make it smaller |'
    """
    options: type[Strict] = FitOptions if job == "fit" else (JOBS | COMMAND_JOBS | _TEXT)[job]
    lines = [f"| {'Key' if door == 'recipe' else 'Option'} | Default | Meaning |", "|---|---|---|"]
    for key, field in options.model_fields.items():
        shared = FitOptions.model_fields.get(key) if job != "fit" and issubclass(options, FitOptions) else None
        flag = flag_of(options, key)
        if (shared is not None and shared.default == field.default) or (door == "command" and not flag.names):
            continue
        meaning, default = field.description or "", _shown(field)
        if door == "command" and flag.sets is not None:
            meaning, default = flag.help or meaning, ""
        words = words_of(options, key)
        if words is not None and not all(word in meaning for word in words.words):
            meaning += f". One of {', '.join(f'`{word}`' for word in words.words)}"
        if door == "recipe" and key == "reserved_ratio":
            default = "required"
        names = f"`{key}`" if door == "recipe" else ", ".join(f"`{name}`" for name in flag.names)
        if door == "command" and flag.metavar:
            names = names[:-1] + f" {flag.metavar}`".replace("|", "\\|")
        lines.append(f"| {names} | {default} | {meaning.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"


def _shown(field: Any) -> str:
    if field.is_required():
        return "by job" if field.description == "peak learning rate" else "required"
    if isinstance(field.default, list):
        return ", ".join(f"`{value}`" for value in field.default)
    if field.default_factory is not None or field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"`{field.default}`" if isinstance(field.default, str) else str(field.default)


def refreshed(text: str) -> str:
    """A page with its tables of options as the classes say them."""
    return _BLOCK.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
