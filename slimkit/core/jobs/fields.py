"""How an option is declared: strict values, words and block numbers, and how the command line spells it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from slimkit.core import check

# How a message names an option, by its key: "stages[2].train.epochs" or "--epochs".
Spell = Callable[[str], str]

# So many samples are all there are.
EVERY = 1_000_000_000


class Strict(BaseModel):
    """Unknown keys are errors, values keep their types ("3" is not 3), and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        # A flag's word is as good as the key: one knob has one name through all doors.
        flags = {word: key for key in cls.model_fields for word in flag_of(cls, key).keys if word != key}
        made = {}
        for key, value in given.items():
            meant = flags.get(key, key)
            if meant not in cls.model_fields:
                near = {"key": str(key), "near": check.near(key, [*cls.model_fields, *flags])}
                raise PydanticCustomError("unknown_key", "{key}: unknown key", near)
            if meant in made:
                raise PydanticCustomError("twice", "{key} and {meant} are one option", {"key": key, "meant": meant})
            made[meant] = value
        return made

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """The schema with a flag's words beside the keys, for a recipe takes either."""
        made: dict[str, Any] = handler.resolve_ref_schema(handler(schema))
        known, required = made.get("properties", {}), made.get("required", [])
        for key in list(known):
            others = [word for word in flag_of(cls, key).keys if word != key]
            known |= {word: {**known[key], "description": f"{key}, as the command spells it"} for word in others}
            if others and key in required:
                required.remove(key)
                made["anyOf"] = [{"required": [word]} for word in (key, *others)]
        return made

    def changed(self) -> set[str]:
        """The keys whose values are not the defaults: a recipe as a run keeps it writes out all of them."""
        return {key for key, value in self.defaults().items() if getattr(self, key) != value}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every key's default."""
        return {key: field.get_default(call_default_factory=True) for key, field in cls.model_fields.items()}


@dataclass(frozen=True)
class OneOf:
    """The words that an option takes: a check, an enum of the JSON Schema, and what the shell completes.

    Args:
        table: the words, or "module:NAME" of the table that has a row for each; read when first needed, so that help
            loads no NumPy.
        functions: whether ``file.py:function`` of the user's own is taken as well.
        first: words before those of the table.
        switches: whether true and false are taken as well.
    """

    table: str | tuple[str, ...]
    functions: bool = False
    first: tuple[str, ...] = ()
    switches: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The words, in the table's order."""
        if isinstance(self.table, tuple):
            return self.table
        place, _, name = self.table.partition(":")
        return (*self.first, *getattr(importlib.import_module(place), name))

    def _known(self, value: str | bool | None) -> str | bool | None:
        if value is None or isinstance(value, bool):  # the type has said whether that may be
            return value
        words = self.words
        if value in words or (self.functions and ":" in value):
            return value
        more = ", or file.py:function" if self.functions else ", true or false" if self.switches else ""
        raise PydanticCustomError(
            "one_of",
            "must be one of {words}",
            {"words": ", ".join(map(repr, words)) + more, "near": check.near(value, words)},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        allowed: list[dict[str, Any]] = [{"type": "string", "enum": list(self.words)}]
        if self.functions:
            allowed.append({"type": "string", "pattern": ":"})
        if self.switches:
            allowed.append({"type": "boolean"})
        if schema["schema"]["type"] == "nullable":
            allowed.append({"type": "null"})
        return {"anyOf": allowed} if len(allowed) > 1 else allowed[0]


@dataclass(frozen=True, init=False)
class Flag:
    """How the command line spells an option; without one it is spelt as its key, `batch_size` as --batch-size.

    Args:
        names: of the option, such as --sparsity; none leaves it to recipes.
        metavar: what stands for its value in the help.
        sets: for a switch, what the option becomes where the switch is given.
        help: for a switch, what it says of itself.
        old: former names, which still work and say so.
        stood: what the former names stand for, where they were switches; None where they take the option's value.
    """

    names: tuple[str, ...]
    metavar: str | None
    sets: Any
    help: str | None
    old: tuple[str, ...]
    stood: Any

    def __init__(
        self,
        *names: str,
        metavar: str | None = None,
        sets: Any = None,
        help: str | None = None,
        old: tuple[str, ...] = (),
        stood: Any = None,
    ) -> None:
        given = {"names": names, "metavar": metavar, "sets": sets, "help": help, "old": old, "stood": stood}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names as a recipe's keys: --un-prune is un_prune; a switch is none, for it may say the opposite."""
        return (
            ()
            if self.sets is not None
            else tuple(name[2:].replace("-", "_") for name in self.names if name.startswith("--"))
        )


RECIPE_ONLY = Flag()


def declared(metadata: Sequence[Any], kind: type) -> Any:
    """The mark of a kind in a field's metadata, or None."""
    return next((mark for mark in metadata if isinstance(mark, kind)), None)


def flag_of(options: type[BaseModel], key: str) -> Flag:
    """How the command line spells an option.

    Example:
        >>> flag_of(type("Options", (Strict,), {"__annotations__": {"batch_size": int}}), "batch_size").names
        ('--batch-size',)
    """
    known = options.model_fields[key].metadata if key in options.model_fields else ()
    return declared(known, Flag) or Flag("--" + key.replace("_", "-"))


def words_of(options: type[BaseModel], key: str) -> OneOf | None:
    """The words that an option takes, where it takes only some."""
    field = options.model_fields[key]
    return declared(field.metadata, OneOf) or _inside(field.annotation)


def _inside(annotation: Any) -> OneOf | None:
    """Words that stand deeper in a type: `list[word]`, `word | None`."""
    found = declared(getattr(annotation, "__metadata__", ()), OneOf)
    if found is not None:
        return found
    return next((deep for part in get_args(annotation) if (deep := _inside(part)) is not None), None)


def explained(error: ValidationError) -> list[tuple[tuple[Any, ...], str, str, Any]]:
    """Each mistake once as (where, kind, what is wrong, what came); words come with the nearest one."""
    found = []
    for one in error.errors():
        shown = repr(one["input"])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        # What concerns several options shows none of them.
        came = "" if isinstance(one["input"], Mapping) and "ctx" in one else f". Received: {shown}"
        near = one.get("ctx", {}).get("near", "")
        wrong = one["msg"]
        if one["type"] == "list_type" and isinstance(one["input"], str):
            wrong = f"must be a list, such as {[one['input']]!r}"
        found.append((one["loc"], one["type"], f"{wrong}{came}{near}", one["input"]))
    return found


# No model has a block beyond this; a longer range is a slip of the keyboard.
_HIGHEST_BLOCK = 9999


def numbers_of(text: str) -> tuple[int, ...]:
    """Numbers and ranges as a tuple, in the order in which they were written.

    Example:
        >>> numbers_of("0-2,5")
        (0, 1, 2, 5)
    """
    found: list[int] = []
    for part in text.split(","):
        first, ranged, last = part.strip().partition("-")
        last = last if ranged else first
        if int(last) > _HIGHEST_BLOCK:
            raise ValueError(part)
        found += range(int(first), int(last) + 1)
    return tuple(found)


def whole_number(value: Any) -> Any:
    """A block's number as JSON has it, whose keys are text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def each_block(text: str) -> str:
    """Block numbers as they were written, each once."""
    try:
        found = numbers_of(text)
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise PydanticCustomError("blocks", "must be block numbers, each once, such as 0-9,12,20-29")
    return text
