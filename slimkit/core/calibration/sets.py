"""Calibration sets: windows of tokens with masks, in batches, with a record of where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.calibration.apart import fingerprint, refuse_seen
from slimkit.core.calibration.documents import Encoder, TextSource, documents_of
from slimkit.core.calibration.drawing import WindowForm, draw, shares
from slimkit.core.errors import ArgumentError
from slimkit.core.log import logger
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]


class CalibrationSet(Shown, Sequence[Any]):
    """Windows in batches, as `Compressor`, `Pruner` and the other methods take them.

    A batch is ``{"input_ids": (batch, length), "attention_mask": (batch, length)}``, or the tokens alone.

    Args:
        windows: tokens of each window, without padding.
        padding: the token that fills windows up.
        batch_size: windows in a batch.
        make: (tokens, mask), both (batch, length) int64 -> a batch of the framework's tensors.
        record: where the windows come from, as plain JSON.

    Example:
        >>> found = CalibrationSet([np.array([5, 6, 7]), np.array([8])], 0, 2, lambda ids, mask: (ids, mask), {})
        >>> found[0][0].tolist(), found[0][1].tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """

    def __init__(
        self,
        windows: Sequence[Array],
        padding: int,
        batch_size: int,
        make: Callable[[Array, Array], Any],
        record: dict[str, Any],
    ) -> None:
        self.windows = list(windows)
        self.record = record
        self._padding, self._size, self._make = padding, batch_size, make

    def __len__(self) -> int:
        return (len(self.windows) + self._size - 1) // self._size

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        return self._make(*self.arrays(slice(number * self._size, (number + 1) * self._size)))

    def arrays(self, which: slice = slice(None)) -> tuple[Array, Array]:
        """Tokens and mask of some windows, (windows, longest) int64 each; the mask is 1 where a token is real."""
        rows = self.windows[which]
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row)], mask[at, : len(row)] = row, 1
        return ids, mask

    def _rows(self) -> Iterable[tuple[str, Any]]:
        yield "windows", len(self.windows)
        yield "batches", len(self)
        yield from self.record.items()

    def __repr__(self) -> str:
        return f"CalibrationSet({len(self.windows)} windows in {len(self)} batches, {self.record.get('tokens')} tokens)"


def calibration_set(
    texts: Any,
    tokenizer: Any,
    n: int,
    length: int,
    seed: int,
    tensor: Callable[[Array], Any],
    *,
    weights: Sequence[float] | None = None,
    pack: bool | str = "auto",
    batch_size: int = 4,
    masks: bool = True,
    held_out: Any = None,
    text_key: str = "text",
) -> CalibrationSet:
    """What the wings' `calibration` does; `tensor` makes their tensors of arrays."""
    check.integer(n, "n", 1)
    check.integer(length, "length", 2)
    check.integer(seed, "seed", 0)
    check.integer(batch_size, "batch_size", 1)
    check.boolean(masks, "masks")
    if pack != "auto":
        check.boolean(pack, "pack")
    sources = sources_of(texts, weights, text_key)
    # A tokenizer that marks whole texts with [CLS] belongs to an encoder, which never saw two texts as one.
    packed = getattr(tokenizer, "cls_token_id", None) is None if pack == "auto" else bool(pack)

    def make(ids: Array, mask: Array) -> Any:
        return {"input_ids": tensor(ids), "attention_mask": tensor(mask)} if masks else tensor(ids)

    found = drawn_set(sources, tokenizer, n, length, seed, packed, batch_size, make)
    if not masks and any(len(w) < length for w in found.windows):
        raise ArgumentError(
            "masks=False is for windows without padding, and the documents do not fill all of them: give more text, "
            "a smaller length or a smaller n"
        )
    if held_out is not None:
        refuse_seen(found.record, encoded(held_out, tokenizer, text_key), "held_out")
    return found


def encoded(texts: Any, tokenizer: Any, text_key: str = "text") -> list[Array]:
    """The tokens of held-out documents, to look for windows in."""
    encode = Encoder(tokenizer, special=False)
    return [encode(d, f"held_out[{at}]") for at, d in enumerate(_source(texts, 1.0, text_key, "held_out").documents)]


def drawn_set(
    sources: Sequence[TextSource],
    tokenizer: Any,
    n: int,
    length: int,
    seed: int,
    pack: bool,
    batch_size: int,
    make: Callable[[Array, Array], Any],
) -> CalibrationSet:
    """Draw a calibration set from named sources; `make` turns tokens and mask into a batch."""
    form = window_form(tokenizer, length, pack)
    encode = Encoder(tokenizer, special=not pack)
    windows: list[Array] = []
    parts: list[list[Array]] = []
    origins = []
    # What a tokenizer puts around a text stands around no held-out one.
    around = [] if pack else list(getattr(tokenizer, "all_special_ids", ()))
    counts = shares([s.weight for s in sources], n)
    for at, (source, count) in enumerate(zip(sources, counts)):
        before = encode.chats
        drawn = draw(source.documents, encode, count, form, [seed, at], source.name)
        windows += drawn.windows
        parts += [[ids[~np.isin(ids, around)] for ids in found] for found in drawn.parts]
        origins.append(
            {
                "name": source.name, "weight": float(source.weight), "documents": len(source.documents),
                "drawn from": len(drawn.documents), "windows": len(drawn.windows), "asked": count,
                "conversations": encode.chats - before,
            }
        )  # fmt: skip
    record = {
        "windows": len(windows), "length": length, "tokens": int(sum(map(len, windows))), "seed": seed,
        "packed": pack, "sources": origins, "sha256": _digest(windows), "stretches": fingerprint(parts),
    }  # fmt: skip
    _say(record, n)
    fill = getattr(tokenizer, "pad_token_id", None)
    fill = getattr(tokenizer, "eos_token_id", None) if fill is None else fill
    return CalibrationSet(windows, int(fill or 0), batch_size, make, record)


def sources_of(texts: Any, weights: Sequence[float] | None, text_key: str = "text") -> list[TextSource]:
    """A user's texts as sources: one, or with weights one for each.

    Raises:
        ArgumentTypeError, ArgumentError: no documents, or weights that do not fit.
    """
    if weights is None:
        return [_source(texts, 1.0, text_key, "texts")]
    if not isinstance(texts, (list, tuple)) or len(texts) != len(weights):
        check.wrong_value("texts", f"a list of {len(weights)} sources, one for each weight", type(texts).__name__)
    for at, weight in enumerate(weights):
        if not check.number(weight, f"weights[{at}]") > 0:
            check.wrong_value(f"weights[{at}]", "above 0", weight)
    return [_source(one, float(w), text_key, f"texts[{at}]") for at, (one, w) in enumerate(zip(texts, weights))]


def _source(texts: Any, weight: float, text_key: str, name: str) -> TextSource:
    if isinstance(texts, (str, Path)):
        from slimkit.core.jobs.sources import read_documents

        return TextSource(str(texts), read_documents(Path(texts), text_key), weight)
    return TextSource(name, documents_of(texts, text_key, name), weight)


def window_form(tokenizer: Any, length: int, pack: bool) -> WindowForm:
    """The form of a tokenizer's windows: packed ones begin as the tokenizer begins a text."""
    if not pack or tokenizer is None:
        return WindowForm(length, pack, separator=getattr(tokenizer, "eos_token_id", None))
    start = getattr(tokenizer, "bos_token_id", None)
    begun = list(tokenizer("a")["input_ids"])[:1]
    return WindowForm(
        length,
        pack,
        start if start is not None and begun == [start] else None,
        getattr(tokenizer, "eos_token_id", None),
    )


def _digest(windows: Iterable[Array]) -> str:
    digest = hashlib.sha256()
    for ids in windows:
        digest.update(np.asarray(ids, "<i8").tobytes() + b"|")
    return digest.hexdigest()


def _say(record: Mapping[str, Any], asked: int) -> None:
    sources = record["sources"]
    where = ", ".join(
        f"{s['windows']} from {s['drawn from']:,} of {s['documents']:,} documents of {s['name']}"
        + (f" ({s['conversations']} conversations by the chat template)" if s["conversations"] else "")
        for s in sources
    )
    filled = record["tokens"] / (record["windows"] * record["length"])
    how = "short documents packed" if record["packed"] else "short documents padded, with masks"
    logger.info(
        "calibration: %d windows of %d tokens (%s), %s, %.1f %% padding, seed %d",
        record["windows"], record["length"], where, how, 100 * (1 - filled), record["seed"],
    )  # fmt: skip
    if record["windows"] < asked:
        logger.warning(
            "calibration: the documents hold %d windows of %d tokens, not the %d asked for",
            record["windows"], record["length"], asked,
        )  # fmt: skip
