"""Data and models as a command line names them: text files, arrays, shapes, functions."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.calibration import OWN
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.files import meant, read_tensors, readable_file
from slimkit.core.jobs.documents import is_chat
from slimkit.core.lazy import library
from slimkit.core.yamltext import parse_yaml

Array = np.ndarray[Any, Any]

TEXT_ENDINGS = (".jsonl", ".json", ".txt", ".md", ".parquet")
ARRAY_ENDINGS = (".npy", ".npz", ".safetensors")

# What NumPy's readers raise on damaged or dishonest files; a header may claim more numbers than any memory holds.
_ARRAY_ERRORS = (
    ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError,
    OverflowError, NotImplementedError, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip

# A line longer than this is no sentence but a damaged file.
_LONGEST_LINE = 16 << 20


@dataclass(frozen=True)
class ModelPlace:
    """Which model a command works on.

    Args:
        model: a Hugging Face directory, a folder written by a command, or a weight file of the factory's network.
        factory: ``package.module:function`` or ``file.py:function`` that makes the network; None for directories that
            say it themselves.
        arguments: keyword arguments of the factory.
        option: what the user named the model by, for messages.
    """

    model: Path | None = None
    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    option: str = "--model"

    def __post_init__(self) -> None:
        if self.model is None and self.factory is None:
            raise ConfigError("give --model DIRECTORY, or --factory MODULE:FUNCTION (with --model WEIGHTS)")
        if self.arguments and self.factory is None:
            raise ConfigError("--arg is for the function of --factory")
        if self.model is not None and not self.model.exists():
            raise FileFormatError(
                f"{self.option} must be an existing file or directory. Received: {str(self.model)!r}{meant(self.model)}"
            )

    def make(self) -> Any:
        """Call the factory."""
        assert self.factory is not None
        return found(self.factory, "--factory")(**self.arguments)


@dataclass(frozen=True)
class StudentPlace:
    """Which student a command trains.

    Args:
        sizes: layers, ffn, heads, hidden of a student cut out of a Hugging Face teacher, those that change.
        selection: "importance" or "first": which rows and columns of that teacher stay.
        layer_map: blocks of that teacher that stay, by number; None: those that the data needs most.
        teacher: "online": asked at every step; "cached": once; "auto": what is cheaper.
        place: the student of a factory's teacher; None for Hugging Face directories.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    selection: str = "importance"
    layer_map: tuple[int, ...] | None = None
    teacher: str = "auto"
    place: ModelPlace | None = None

    def __post_init__(self) -> None:
        check.choice(self.selection, ("importance", "first"), "--selection")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree in, the student's weights apart."""
        made = None if self.place is None else [self.place.factory, dict(self.place.arguments)]
        kept = None if self.layer_map is None else list(self.layer_map)
        return {
            "sizes": dict(self.sizes),
            "selection": self.selection,
            "layer_map": kept,
            "student": made,
            "asked": self.teacher,
        }


@dataclass(frozen=True)
class DataPlace:
    """Which data a command reads.

    Args:
        reference: a text file, a file of arrays, or ``module:function``.
        text_key: the key of the text in JSON lines.
        samples: at most so many are read.
        max_length: texts are cut to so many tokens.
        batch_size: samples in a batch.
        weight: share of the windows beside other sources of calibration text.
        more: the other sources.
        seed: of what is drawn from text.
        option: the flag that named it.
    """

    reference: str
    text_key: str = "text"
    samples: int = 128
    max_length: int = 128
    batch_size: int = 8
    weight: float = 1.0
    more: tuple[DataPlace, ...] = ()
    seed: int = 0
    option: str = "--data"

    @property
    def kind(self) -> str:
        """ "text", "arrays", "function" or, to calibrate on, "self"; ConfigError for anything else."""
        path = Path(self.reference)
        if self.reference == OWN:
            return OWN
        if path.exists():
            if path.suffix in TEXT_ENDINGS:
                return "text"
            if path.suffix in ARRAY_ENDINGS:
                return "arrays"
        elif ":" in self.reference:
            return "function"
        raise ConfigError(
            f"{self.option} must name an existing file that ends in {', '.join((*TEXT_ENDINGS, *ARRAY_ENDINGS))}, or "
            f"MODULE:FUNCTION. Received: {self.reference!r}{'' if path.exists() else meant(path)}"
        )

    def rows(self, *, chats: bool = False) -> list[dict[str, Any]]:
        """The samples of a text file; with `chats` also conversations, and prompts with completions."""
        return read_rows(Path(self.reference), self.text_key, self.samples, chats=chats)

    def array_batches(self) -> list[Any]:
        """The batches of a file of arrays."""
        return batches_of(read_arrays(Path(self.reference)), self.batch_size, self.samples)

    def made_batches(self, option: str) -> list[Any]:
        """What the function returns: batches, or a recipe's mapping with the key calibration."""
        made = found(self.reference, option)()
        made = made.get("calibration") if isinstance(made, Mapping) else made
        if made is None or isinstance(made, (str, bytes)) or not hasattr(made, "__iter__"):
            raise ConfigError(f"{option}: {self.reference} must return batches, or a mapping with the key calibration")
        return [batch for _, batch in zip(range(max(1, self.samples // self.batch_size)), made)]


def found(reference: str, option: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names; what it raises names the option.

    Args:
        reference: a file is looked for in the working directory, a module there too and then where Python looks.
        option: for messages.

    Returns:
        The function.

    Raises:
        ConfigError: it does not exist, importing it fails, or (when called) it raises.
    """
    from slimkit.core.jobs import factory

    place = reference.partition(":")[0]
    root = place.partition(".")[0]
    if not place.endswith(".py") and root and importlib.util.find_spec(root) is None:
        sys.path.insert(0, os.getcwd())  # an installed `slimkit` does not look in the working directory
    factory.resolve(reference, Path.cwd(), option)
    return lambda *args, **kwargs: factory.make(reference, Path.cwd(), option, *args, **kwargs)


def settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """KEY=VALUE texts as a dict, the values read as YAML.

    Example:
        >>> settings(["width=8", "name=a"], "--arg")
        {'width': 8, 'name': 'a'}
    """
    values = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise ConfigError(f"{option} must be KEY=VALUE. Received: {pair!r}")
        try:
            values[key] = parse_yaml(value)
        except FileFormatError:
            raise ConfigError(f"{option} {key}: the value is not YAML. Received: {value!r}") from None
    return values


def read_rows(
    path: Path, text_key: str = "text", limit: int | None = None, *, chats: bool = False
) -> list[dict[str, Any]]:
    """The samples of a text file: a JSON object (or string) a line, rows of a table, or plain text, a sample a line.

    Args:
        path: .jsonl or .json (a value a line), .parquet (a row each; needs pyarrow), anything else is plain text; blank
            lines are left out.
        text_key: the key under which an object holds its text.
        limit: read no more samples than this.
        chats: also take objects without a text that hold "messages", or a "prompt" with its "completion".

    Returns:
        A mapping for each sample, its text under "text", other keys as they are.

    Raises:
        FileFormatError: the file is damaged, or a line has no text; the message gives the line's number.
        MissingFrameworkError: a .parquet file, and pyarrow is not installed.
    """
    rows: list[dict[str, Any]] = []
    for where, row in _text_rows(readable_file(path, "the data file")):
        if limit is not None and len(rows) >= limit:
            break
        rows.append(_sample(row, text_key, where, chats))
    if not rows:
        raise FileFormatError(f"{path} holds no text.")
    return rows


def read_documents(path: Path, text_key: str = "text") -> list[Any]:
    """The documents of a text file: a text each, or the messages of a conversation where a row has them.

    Args:
        path: .jsonl, .json, .parquet or plain text, as for `read_rows`.
        text_key: the key under which a row holds its text; a row without it may have "messages".

    Raises:
        FileFormatError: the file is damaged, or a row has neither; the message says which.
        MissingFrameworkError: a .parquet file, and pyarrow is not installed.
    """
    found: list[Any] = []
    for where, row in _text_rows(readable_file(path, "the data file")):
        told = row if isinstance(row, str) or isinstance(row.get(text_key), str) else row.get("messages")
        if isinstance(told, list) and told and all(isinstance(m, dict) for m in told):
            found.append(told)
        else:
            found.append(row if isinstance(row, str) else _text_of(row, text_key, where))
    if not found:
        raise FileFormatError(f"{path} holds no text.")
    return found


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every sample of a text file, a mapping or a text, with the place that messages name; blank lines are left out."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield where, _json_row(line, where) if path.suffix in (".jsonl", ".json") else line


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = library("pyarrow", "parquet")
    parquet = library("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for part in file.iter_batches():
                for row in part.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"{path} is not a readable .parquet file: {' '.join(str(error).split())[:200]}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as handle:
            number = 0
            while line := handle.readline(_LONGEST_LINE):
                number += 1
                if len(line) >= _LONGEST_LINE:
                    raise FileFormatError(f"{path}, line {number} is longer than {_LONGEST_LINE} characters.")
                yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: {error}") from None


def _json_row(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON: {error}") from None
    return value if isinstance(value, str | dict) else {}


def _sample(row: Any, text_key: str, where: str, chats: bool) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if chats and text_key not in row and is_chat(row):
        return dict(row)
    return {**row, "text": _text_of(row, text_key, where)}


def _text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    if isinstance(row.get(text_key), str):
        return str(row[text_key])
    raise FileFormatError(
        f"{where} must be an object with a text under {text_key!r}{check.near(text_key, list(row))}. "
        f"Its keys: {list(row)}"
    )


def read_arrays(path: Path) -> Any:
    """The array of a .npy file, or name -> array of a .npz or .safetensors file; nothing is unpickled.

    Raises:
        FileFormatError: damaged, or holding Python objects.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path, "the data file")[0]
    with open(readable_file(path, "the data file"), "rb") as handle:
        try:
            if path.suffix == ".npy":
                return np.lib.format.read_array(handle, allow_pickle=False)  # type: ignore[no-untyped-call]
            with np.load(handle, allow_pickle=False) as loaded:
                return {name: loaded[name] for name in loaded.files}
        except _ARRAY_ERRORS as error:
            raise FileFormatError(f"{path} is not a readable {path.suffix} file: {error}") from None


def batches_of(arrays: Any, batch_size: int, limit: int) -> list[Any]:
    """Arrays cut into batches along their first axis: an array gives arrays, a dict gives dicts.

    Example:
        >>> [b.shape for b in batches_of(np.zeros((5, 2)), 2, 4)]
        [(2, 2), (2, 2)]
    """
    first = next(iter(arrays.values())) if isinstance(arrays, dict) else arrays
    if first.ndim == 0 or not len(first):
        raise FileFormatError("the arrays of a data file need a first axis of at least one sample.")
    count = min(len(first), limit)
    cuts = [slice(at, min(at + batch_size, count)) for at in range(0, count, batch_size)]
    if not isinstance(arrays, dict):
        return [arrays[cut] for cut in cuts]
    if any(a.ndim == 0 or len(a) != len(first) for a in arrays.values()):
        raise FileFormatError("the arrays of a data file must have first axes of one length.")
    return [{name: array[cut] for name, array in arrays.items()} for cut in cuts]


def parse_example(text: str, seed: int = 0) -> Any:
    """An example input from a shape: "1,3,224,224", "1,128:int64", or "NAME=SHAPE;NAME=SHAPE" for keywords.

    Floats are standard normal, integers are zeros and ones (which every table and mask knows).

    Example:
        >>> parse_example("2,3").shape, parse_example("ids=1,4:int64")["ids"].dtype
        ((2, 3), dtype('int64'))
    """
    rng = np.random.default_rng(seed)
    if "=" in text:
        return {name.strip(): _filled(shape, rng) for name, _, shape in (p.partition("=") for p in text.split(";"))}
    return _filled(text, rng)


def _filled(text: str, rng: np.random.Generator) -> Array:
    sizes, _, kind = text.partition(":")
    dtype = check.choice(
        kind.strip() or "float32", ("float32", "float16", "int64", "int32", "bool"), "--example's type"
    )
    try:
        shape = tuple(int(n) for n in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--example must be a shape such as 1,3,224,224 or 1,128:int64. Received: {text!r}")
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
