"""A job's options as flags of its command: the command line's reading of `core.jobs.options`."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from slimkit.core.errors import ConfigError
from slimkit.core.jobs.fields import Strict, explained, flag_of, words_of

# In the name of a parameter, between a key and the number of its former flag.
_OLD = "__old"
# Given alone for a list: none at all, where leaving it out means a choice of one's own.
NONE = "none"

_PANELS = {
    "Training": (
        "epochs", "learning_rate", "optimizer", "weight_decay", "schedule", "warmup", "max_steps", "gradient_clip_norm",
        "gradient_clip_value",
    ),
    "Data": ("batch_size",),
}  # fmt: skip


def parameters(options: type[Strict]) -> list[inspect.Parameter]:
    """A keyword for each option that the command line has a flag for, as typer reads it.

    Args:
        options: a job's options.
    """
    found = []
    for key, field in options.model_fields.items():
        flag, words = flag_of(options, key), words_of(options, key)
        if not flag.names:
            continue
        kind, many = _plain(field.annotation)
        default = None if field.is_required() or field.default_factory else field.default
        switch = kind is bool
        if flag.sets is not None:
            kind, default, switch = bool, False, True
        if kind is str and isinstance(default, bool):
            default = str(default).lower()
        if many:
            default = None
        text = flag.help or field.description or ""
        first = text.partition(" ")[0].rstrip(",:")
        known = words is not None and first in words.words
        said = (text if known or "_" in first else text[:1].upper() + text[1:]).rstrip(".") + "."
        if words is not None and not any(word in text for word in words.words[:2]):
            said += f" One of {', '.join(words.words)}."
        option = typer.Option(
            *flag.names,
            help=said,
            metavar=None if switch else flag.metavar,
            show_default=default is not None and not switch,
            autocompletion=None if words is None else _completes(words),
            rich_help_panel=next((panel for panel, keys in _PANELS.items() if key in keys), None),
        )
        shown: Any = list[str] if many else kind
        annotation: Any = Annotated[shown if default is not None else shown | None, option]
        found.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        for at, name in enumerate(flag.old):
            hidden = typer.Option(name, hidden=True, help=f"The old {flag.names[0]}.")
            former: Any = Annotated[(shown if flag.stood is None else bool) | None, hidden]
            found.append(
                inspect.Parameter(f"{key}{_OLD}{at}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=former)
            )
    return found


def made(job: type[Strict], /, **given: Any) -> Any:
    """The options that flags give; what was left at its default is not said.

    Args:
        job: a job's options.
        given: key -> value as typer read it.

    Raises:
        ConfigError: a value is not allowed; the message begins with the flag.
    """
    from pydantic import ValidationError

    from slimkit.core.jobs import sources

    asked: dict[str, Any] = {}
    for key, value in _renamed(job, given).items():
        field, flag = job.model_fields[key], flag_of(job, key)
        if flag.sets is not None:
            value = flag.sets if value else field.default
        elif value == [NONE] and field.default is None and _origin(field.annotation) is list:
            asked[key] = []
            continue
        elif isinstance(value, list):
            value = (
                sources.settings(value, flag.names[0]) if _origin(field.annotation) is dict else _numbers(field, value)
            )
        elif value == "auto" and field.default is None:
            value = None
        elif value in ("true", "false") and isinstance(field.default, bool):
            value = value == "true"
        if value not in (None, [], {}) and value != field.default:
            asked[key] = value
    try:
        return job(**asked)
    except ValidationError as error:
        lines = [
            f"{flag_of(job, str(at[0])).names[0] + ': ' if at else ''}{said}" for at, _, said, _ in explained(error)
        ]
        raise ConfigError("; ".join(dict.fromkeys(lines))) from None


def spoken(message: str, jobs: Sequence[type[Strict]]) -> str:
    """An error that begins with a key, as the Python functions call it, in the command line's words.

    Example:
        >>> from slimkit.core.jobs.options import SparsifyOptions
        >>> spoken("SparseConfig.sparse_ratio must lie between 0 and 1.", [SparsifyOptions])
        '--sparsity must lie between 0 and 1.'
    """
    found = re.match(r"(?:\w+\.)?(\w+)(?=:| must | is )", message)
    if found is None:
        return message
    for job in jobs:
        if found[1] in job.model_fields and (names := flag_of(job, found[1]).names):
            return names[0] + message[found.end() :]
    return message


def _renamed(job: type[Strict], given: dict[str, Any]) -> dict[str, Any]:
    """The same without former names, each of which says what it is called now."""
    from slimkit.core.log import logger

    found = {key: value for key, value in given.items() if _OLD not in key}
    for former, value in given.items():
        key, sign, at = former.partition(_OLD)
        if not sign or value in (None, []):
            continue
        flag = flag_of(job, key)
        new, old = flag.names[0], flag.old[int(at)]
        default = job.model_fields[key].default
        if found[key] not in (None, [], default, str(default).lower()):
            raise ConfigError(f"{old} is the old name of {new}, and both are given")
        if flag.stood is not None:
            value = flag.stood
            new = f"{new} {value}"
        logger.warning("%s is the old name of %s", old, new)
        found[key] = value
    return found


def _completes(words: Any) -> Any:
    return lambda incomplete: [word for word in words.words if word.startswith(incomplete)]


def _numbers(field: Any, texts: list[str]) -> list[Any]:
    """The items of a list; where it may hold numbers, those that are."""
    if int not in _parts(field.annotation):
        return texts
    return [int(text) if text.lstrip("-").isdigit() else text for text in texts]


def _parts(annotation: Any) -> set[Any]:
    """Every type named in a type."""
    return {annotation, get_origin(annotation)}.union(*(_parts(part) for part in get_args(annotation)))


def _origin(annotation: Any) -> Any:
    """The type, without None beside it and marks around it."""
    if get_origin(annotation) is Annotated:
        return _origin(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _origin(next(part for part in get_args(annotation) if part is not type(None)))
    return get_origin(annotation) or annotation


def _plain(annotation: Any) -> tuple[type, bool]:
    """What typer reads for a type, and whether the flag may be given several times."""
    kind = _origin(annotation)
    if kind is bool and str in _parts(annotation):  # a word, or true and false as words
        return str, False
    if kind in (list, dict):
        return str, True
    return (kind if kind in (bool, int, float) else str), False
