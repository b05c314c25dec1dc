"""A GGUF file streamed into a Hugging Face folder: values by the library `gguf`, one piece of a tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.checkpoint.saving import Items, write_items
from slimkit.core.checkpoint.weightfile import CHUNK_BYTES, Array, Entry, Piece, encode
from slimkit.core.convert.ggufwords import (
    ROPE_FACTORS,
    TensorPlace,
    Words,
    config_of,
    places_of,
    special_tokens,
)
from slimkit.core.errors import ArgumentError, FileFormatError, UnsupportedError
from slimkit.core.lazy import library
from slimkit.core.showing import Shown

# What a user writes -> what safetensors writes.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TOKENS = "tokenizer.ggml.tokens"

# Writes the tokenizer of a GGUF file into a folder.
WriteTokenizer = Callable[[Path, Path], None]


@dataclass(frozen=True, repr=False)
class GgufReport(Shown):
    """What a GGUF file became.

    Args:
        architecture: the class of transformers that reads the folder.
        parameters: how many numbers the model holds; a tied table counts once.
        dtype: the element type written.
        types: the file's own types, each with the number of its tensors: {"Q4_1": 210, "F32": 61}.
        tied: whether the output layer is the table of tokens, which is then one tensor.
        tokenizer: whether the file held one; with its chat template, where it has one.
        chat_template: whether the file held one.
        path: the folder.
        bytes_written: the size of model.safetensors.
    """

    architecture: str
    parameters: int
    dtype: str
    types: dict[str, int] = field(default_factory=dict)
    tied: bool = False
    tokenizer: bool = False
    chat_template: bool = False
    path: str = ""
    bytes_written: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


class Gguf:
    """An open GGUF file, checked: every tensor has a place, a type that can be read and the right shape.

    Args:
        path: the file.

    Raises:
        FileFormatError: it is damaged, or lacks something.
        UnsupportedError: its architecture, a key, a tensor or a tensor's type is not known.
        MissingFrameworkError: `gguf` is not installed.
    """

    def __init__(self, path: Any) -> None:
        self.path = files.readable_file(path, "src")
        self.library = library("gguf", "gguf")
        try:
            reader = self.library.GGUFReader(self.path)
            # Of long lists, the tokens among them, it is enough to know that they are there.
            fields = {name: f.contents() if len(f.data) < 4096 else name for name, f in reader.fields.items()}
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
            raise FileFormatError(f"{self.path} is not a readable GGUF file: {str(error)[:200]}") from None
        if reader.byte_order == "S" or fields.get("split.count", 1) > 1:
            what = "of the other byte order" if reader.byte_order == "S" else "one of several; join them first"
            raise UnsupportedError(f"{self.path} is a GGUF file {what}.")
        self.fields = fields
        # GGUF writes the innermost axis first.
        self.tensors = {t.name: t for t in reader.tensors}
        self.shapes = {n: tuple(int(s) for s in reversed(t.shape)) for n, t in self.tensors.items()}
        words = Words(self.path, fields)
        for tensor in self.tensors.values():
            self._check_type(tensor)
        factors = None
        if words.prefix == "llama" and ROPE_FACTORS in self.tensors:
            factors = self._values(ROPE_FACTORS, np.arange(self.shapes[ROPE_FACTORS][0]))
        self.config = config_of(words, self.shapes, factors)
        self.places = places_of(words, self.config, self.shapes)

    def _check_type(self, tensor: Any) -> None:
        _, size = self.library.GGML_QUANT_SIZES[tensor.tensor_type]
        try:
            self.library.dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: the tensor {tensor.name} is of type {tensor.tensor_type.name}, which gguf cannot read."
            ) from None

    def _values(self, name: str, rows: Array) -> Array:
        """Some rows of a tensor as float32; of one with a single axis, some of its numbers."""
        tensor = self.tensors[name]
        if len(self.shapes[name]) == 1:
            return np.asarray(self.library.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type))[rows]
        return np.asarray(self.library.dequantize(np.ascontiguousarray(tensor.data[rows]), tensor.tensor_type))

    def rows(self, place: TensorPlace) -> Array:
        """Which row of the file stands in each row of the result.

        llama.cpp turns neighbours (2j, 2j + 1) of a head into each other, transformers turns (j, j + half): its rows
        are the file's, first the even ones of a head and then the odd ones.
        """
        n = np.arange(place.shape[0])
        if place.heads is None:
            return n
        return n.reshape(place.heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def piece(self, name: str, dtype: str) -> Piece:
        """One tensor's stored bytes in the type asked for, a few megabytes at a time."""
        place = self.places[name]
        width = int(np.prod(place.shape[1:], dtype=np.int64))
        step = max(1, CHUNK_BYTES // (4 * width))
        order = self.rows(place)

        def chunks() -> Iterator[memoryview]:
            for at in range(0, len(order), step):
                values = self._values(name, order[at : at + step])
                with np.errstate(over="ignore"):
                    stored = encode(values, dtype)
                if dtype == "F16" and np.isinf(stored).any() and not np.isinf(values).any():
                    raise UnsupportedError(f"{self.path}: {name} holds numbers that float16 cannot; ask for bfloat16.")
                yield np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data

        return Piece(place.shape, chunks)

    def report(self, dtype: str, path: Path) -> GgufReport:
        """What the file becomes."""
        entries = [Entry("F32", p.shape) for p in self.places.values()]
        return GgufReport(
            self.config["architectures"][0],
            sum(e.size for e in entries),
            dtype,
            types=dict(Counter(self.tensors[n].tensor_type.name for n in self.places)),
            tied=self.config["tie_word_embeddings"],
            tokenizer=TOKENS in self.fields,
            chat_template="tokenizer.chat_template" in self.fields,
            path=str(path),
        )


def planned(src: Any, dst: Any, dtype: str, *, replace: bool = False) -> tuple[Gguf, GgufReport]:
    """The checked file and what it would become; nothing is written."""
    check.choice(dtype, DTYPES, "dtype")
    folder = files.as_path(dst, "dst")
    filled = folder.is_dir() and any(folder.iterdir()) and not replace
    if folder.is_symlink() or filled or (folder.exists() and not folder.is_dir()):
        raise ArgumentError(f"dst must be a folder that does not exist yet or is empty. Received: {str(folder)!r}")
    source = Gguf(src)
    return source, source.report(dtype, folder)


def convert_gguf(
    src: Any, dst: Any, dtype: str, write_tokenizer: WriteTokenizer, *, replace: bool = False
) -> GgufReport:
    """Turn a GGUF file into a Hugging Face folder; the wing's `convert_gguf` says what the arguments mean."""
    source, report = planned(src, dst, dtype, replace=replace)
    tag = DTYPES[dtype]
    items = Items()
    for name, place in source.places.items():
        items.add(place.name, Entry(tag, place.shape), partial(source.piece, name, tag))  # type: ignore[arg-type]
    with files.atomic_directory(report.path) as folder:
        write_items(folder / "model.safetensors", items, with_manifest=False, metadata={"format": "pt"})
        files.write_json(folder / "config.json", {**source.config, "dtype": dtype})
        files.write_json(folder / "generation_config.json", special_tokens(source.fields))
        if report.tokenizer:
            write_tokenizer(source.path, folder)
        size = (folder / "model.safetensors").stat().st_size
    return GgufReport(**{**report.as_dict(), "bytes_written": size})
