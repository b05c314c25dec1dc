"""Text that a language model writes itself: rows sampled from its own start token, kept in a file, resumable.

A token is drawn by inverting the distribution's sum at a uniform number u(seed, row, place),

    next = min { v : sum_{w <= v} softmax(z)[w] > u }        temperature 1, nothing cut off

so that a row depends on the model, the seed and its number, and not on how many rows were asked for.
(Data-free calibration by the model's own samples: Liu et al. 2023, LLM-QAT, section 2.1.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import check, files
from slimkit.core.compare.scores import log_softmax
from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.log import logger, progress
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "slimkit-own-text", 1
# Rows that are written together, and kept together: a run that goes on forms the same groups.
ROWS = 8


def start_token(model: Any) -> int | None:
    """The token that a model's texts begin with by its configuration: its beginning-of-sequence token, or its end's."""
    config = getattr(model, "config", None)
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, (list, tuple)) else found)
    return None


@dataclass(frozen=True)
class OwnTextOptions:
    """What is written.

    Args:
        n: rows.
        length: tokens a row, the start token apart.
        seed: of the sampling.
        start: the token in front of a row, which is no part of it.
    """

    n: int
    length: int
    seed: int
    start: int | None

    def __post_init__(self) -> None:
        check.integer(self.n, "n", 1)
        check.integer(self.length, "length", 2)
        check.integer(self.seed, "seed", 0)
        if self.start is None:
            raise ArgumentError("start is needed: the model's configuration names no token that a text begins with")
        check.integer(self.start, "start", 0)


class OwnText(Shown, Sequence[Any]):
    """Rows of token numbers that a model wrote.

    Args:
        rows: (length,) int64 each.
        record: by which model and how, as plain JSON.
    """

    def __init__(self, rows: Sequence[Array], record: dict[str, Any]) -> None:
        self.rows, self.record = list(rows), record

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return self.rows[at]


def sampled(logits: Array, uniform: Array) -> Array:
    """One token a row by its distribution.

    Args:
        logits: (rows, vocabulary).
        uniform: (rows,) in [0, 1).

    Example:
        >>> sampled(np.log(np.array([[0.5, 0.25, 0.25]] * 3)), np.array([0.1, 0.6, 0.99])).tolist()
        [0, 1, 2]
    """
    if not np.isfinite(logits).all():
        raise ArgumentError("the model's logits are not finite: it writes no text")
    sums = np.exp(log_softmax(logits).astype(np.float64)).cumsum(-1)
    found: Array = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1).astype(np.int64)
    return found


def write_own_text(
    step: Callable[[Array, Any], tuple[Array, Any]],
    options: OwnTextOptions,
    states: Mapping[str, Array],
    file: Path | None,
) -> OwnText:
    """Write what is missing, group by group.

    Args:
        step: (tokens so far (rows, length), the state that it gave last or None) -> (logits (rows, vocabulary), state).
        options: what to write.
        states: the model's parameters and buffers, by which its text is known.
        file: where rows are kept; None: nowhere.

    Raises:
        ArgumentError: the file holds another model's rows, or rows of another seed or form.
        FileFormatError: it is no such file.
    """
    job = {
        "format": FORMAT, "version": VERSION, "model": _digest(states), "start": options.start,
        "length": options.length, "seed": options.seed,
    }  # fmt: skip
    rows = [] if file is None else _kept(file, job, options)
    if rows:
        logger.info("own text: %d of %d rows stand in %s", len(rows), options.n, file)
    groups = range(len(rows), options.n, ROWS)
    for begin in progress(groups, "own text: groups of rows"):
        made = _group(step, options, begin)
        if file is not None:
            _append(file, made)
        rows += list(made)
    rows = rows[: options.n]
    digest = hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()
    return OwnText(rows, {**job, "rows": len(rows), "sha256": digest})


def _group(step: Callable[[Array, Any], tuple[Array, Any]], options: OwnTextOptions, begin: int) -> Array:
    """ROWS rows, (ROWS, length)."""
    uniform = np.stack(
        [np.random.default_rng([options.seed, row]).random(options.length) for row in range(begin, begin + ROWS)]
    )
    assert options.start is not None
    ids = np.full((ROWS, 1), options.start, np.int64)
    state: Any = None
    for place in range(options.length):
        logits, state = step(ids, state)
        ids = np.concatenate([ids, sampled(logits, uniform[:, place])[:, None]], -1)
    return ids[:, 1:]


def _kept(file: Path, job: Mapping[str, Any], options: OwnTextOptions) -> list[Array]:
    """Whole groups of rows that stand in a file; a file that a kill left half written is cut back to them."""
    if not file.exists():
        with files.atomic_file(file, "w") as handle:
            handle.write(json.dumps(job) + "\n")
        return []
    lines = files.readable_file(file, "own text").read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        head = json.loads(lines[0])
    except json.JSONDecodeError:
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FileFormatError(f"{file} is no text that a model wrote itself for slimkit")
    odd = [key for key in job if head.get(key) != job[key]]
    if odd:
        raise ArgumentError(
            f"{file} holds text of another run ({', '.join(odd)} differ): give another file, or remove it"
        )
    rows: list[Array] = []
    for line in lines[1:-1]:  # the last line is empty, or torn
        try:
            ids = np.asarray(json.loads(line)["ids"])
        except (ValueError, KeyError, TypeError):
            break
        if ids.shape != (options.length,) or ids.dtype.kind != "i":
            break
        rows.append(ids.astype(np.int64))
    whole = len(rows) // ROWS * ROWS
    rows = rows[:whole]
    if len(lines) != whole + 2:
        with files.atomic_file(file, "w") as handle:
            handle.write(json.dumps(job) + "\n" + _lines(rows))
    return rows[: -(-options.n // ROWS) * ROWS]


def _append(file: Path, rows: Iterable[Array]) -> None:
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(_lines(rows))
        handle.flush()
        os.fsync(handle.fileno())


def _lines(rows: Iterable[Array]) -> str:
    return "".join(json.dumps({"ids": row.tolist()}) + "\n" for row in rows)


def _digest(states: Mapping[str, Array]) -> str:
    parts = sorted((name, files.digest_array(raw)) for name, raw in states.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
