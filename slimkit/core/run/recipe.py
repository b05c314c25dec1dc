"""The recipe: one YAML file that says which model goes through which stages."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from slimkit.core import check
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.files import read_json, readable_file
from slimkit.core.jobs import factory
from slimkit.core.jobs.factory import LossReference, Reference
from slimkit.core.jobs.fields import Strict, explained
from slimkit.core.jobs.options import JOBS, CalibrateOptions, EvaluateOptions, JobOptions
from slimkit.core.yamltext import parse_yaml

# What a run's record says of itself.
RUN_FORMAT = "slimkit-run"

# A recipe is written by hand; a few lines of YAML aliases can stand for more values than fit into memory.
_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000


def _stage(kind: str, options: type[Strict]) -> type[Strict]:
    """The model of a stage: one key, the job, and under it the job's options."""
    # How much of a model is kept is the point of a recipe that prunes: it must be read there.
    stated = {"reserved_ratio"} & set(options.model_fields)
    if stated:
        asked: dict[str, Any] = {
            key: (
                options.model_fields[key].rebuild_annotation(),
                Field(description=options.model_fields[key].description),
            )
            for key in stated
        }
        options = create_model(options.__name__, __base__=options, __doc__=options.__doc__, **asked)
    fields: dict[str, Any] = {kind: (options, Field(description=(options.__doc__ or "").partition(" (``")[0]))}
    return create_model(f"{kind.capitalize()}Stage", __base__=Strict, **fields)


_STAGES = {kind: _stage(kind, options) for kind, options in JOBS.items()}


def _kind(stage: Any) -> str | None:
    """The one key of a stage; None lets pydantic refuse it."""
    if isinstance(stage, BaseModel):
        return next(iter(type(stage).model_fields))
    if isinstance(stage, Mapping) and len(stage) == 1:
        key = next(iter(stage))
        return key if key in _STAGES else None
    return None


if TYPE_CHECKING:
    Stage = BaseModel
else:
    Stage = Annotated[
        functools.reduce(operator.or_, (Annotated[model, Tag(kind)] for kind, model in _STAGES.items())),
        Discriminator(_kind),
    ]


class Recipe(Strict):
    """A whole run: the model, the data, and the stages it goes through."""

    version: Literal[1] = Field(description="version of this format")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(description="names the report")
    title: str | None = Field(None, description="heading of the report")
    framework: Literal["torch", "mindspore"] = Field("torch", description="which framework runs it")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="every stage is seeded from it and its place")
    output: str | None = Field(None, description="folder of the run; runs/<name> by default")
    imports: list[str] = Field(
        default_factory=list, description="files beside the recipe or modules, loaded first; they may register rows"
    )
    model: Reference = Field(description="makes the model: f(**arguments) -> model; or a Hugging Face folder")
    data: Reference | None = Field(
        None, description="makes the data: f() -> mapping with train, example, calibration; a folder's model needs none"
    )
    tokenizer: str | None = Field(None, description="folder of the tokenizer, where a factory makes the model")
    calibrate: CalibrateOptions | None = Field(None, description="calibration windows of text")
    evaluate: EvaluateOptions | None = Field(None, description="held-out text that judges each stage")
    loss: LossReference = Field("cross_entropy", description="cross_entropy, mse, or f(model, batch) -> scalar")
    metrics: Reference | None = Field(None, description="f(model, data, dense) -> {name: number}")
    samples: Reference | None = Field(None, description="f(model, data) -> {prompt: answer}, shown in the report")
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="run in this order")

    @model_validator(mode="after")
    def _data_or_folder(self) -> Recipe:
        if self.data is None and (not isinstance(self.model, str) or ":" in self.model):
            raise PydanticCustomError("missing_data", "data: this key is required, where a factory makes the model")
        return self

    def steps(self) -> list[tuple[str, JobOptions]]:
        """The stages as (kind, options)."""
        return [(kind, getattr(stage, kind)) for stage in self.stages for kind in type(stage).model_fields]


def paths_begin(path: Path) -> Path:
    """The folder in which a recipe's paths begin: its own, and for the record of a run that of the run's recipe."""
    if path.name == "run.json":
        told = read_json(path, "run record")
        if isinstance(told, dict) and isinstance(told.get("folder"), str):
            return Path(told["folder"])
    return path.parent


def load_recipe(path: Any, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the run.json of a run.
        overrides: dotted key -> value, for example {"seed": 3, "stages.0.train.epochs": 1}.

    Returns:
        The checked, immutable recipe.

    Raises:
        FileFormatError: the file does not exist.
        ConfigError: it is not YAML, or says something that is not allowed; the message begins with the key's path.
    """
    file = readable_file(path, "recipe")
    if file.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{file} is larger than {_MOST_BYTES:,} bytes, which no recipe should be")
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (FileFormatError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping of keys. Received: {type(content).__name__}")
    if content.get("format") == RUN_FORMAT and isinstance(content.get("recipe"), dict):
        content = content["recipe"]  # the record of a run holds the whole recipe
    if _values(content, {}) > _MOST_VALUES:
        raise ConfigError(f"{file}: its aliases make more than {_MOST_VALUES:,} values, or lead back to themselves")
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    # What they register, such as a method of sparsity, is a word that the stages may then take.
    asked = content.get("imports")
    for place in asked if isinstance(asked, list) else ():
        factory.load(str(place), paths_begin(file), "imports")
    return parse_recipe(content, source=str(file))


def _values(value: Any, known: dict[int, float]) -> float:
    """How many values a parsed file holds once its aliases are written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        inner = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(value)]


def parse_recipe(content: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check the content of a recipe; ConfigError names each wrong key by its path.

    Example:
        >>> parse_recipe({"version": 1, "name": "x", "model": "m.py:f", "data": "m.py:d",
        ...               "stages": [{"prune": {"reserved_ratio": 0.5}}]}).steps()[0][0]
        'prune'
    """
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        lines = [_explain(*mistake) for mistake in explained(error)]
        raise ConfigError(f"{source}: " + "\n  ".join(dict.fromkeys(lines))) from None


def _explain(location: tuple[Any, ...], kind: str, message: str, value: Any) -> str:
    """One line of a validation error: the key's path as written in the YAML, then what is wrong."""
    path, previous = "", None
    for part in location:
        # The tag of a union, which the YAML does not repeat, is no part of the path.
        tag = part in _STAGES if isinstance(previous, int) else part in ("Factory", "str")
        if isinstance(part, int):
            path += f"[{part}]"
        elif not tag:
            path += f".{part}" if path else str(part)
        previous = part
    if kind == "missing":
        message = "this key is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        keys = list(value) if isinstance(value, Mapping) else [value]
        near = check.near(keys[0], list(_STAGES)) if len(keys) == 1 else ""
        message = f"a stage is one of {', '.join(_STAGES)}. Received: {', '.join(map(repr, keys))}{near}"
    if kind == "unknown_key":
        return f"{path}.{message}" if path else message
    return f"{path or 'recipe'}: {message}"


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in raw recipe content, in place; list positions are numbers."""
    *path, last = key.split(".")
    here: Any = content
    try:
        for part in path:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        if isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise ConfigError(f"{key}: there is no such place in the recipe") from None
