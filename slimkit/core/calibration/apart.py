"""Whether held-out text was calibrated on: stretches of tokens of the one looked for in the other.

A window of a calibration set is known by at most STRETCHES stretches of STRETCH tokens, each a 64-bit number

    h(t) = sum_i t[i] c[i]  mod 2**64,    c odd and fixed

Held-out documents are hashed at every offset, so that another cutting into lines, documents or windows hides nothing.
No stretch goes across two documents: packing has an order of its own. A document of fewer tokens is one stretch.

A window counts as seen where nine tenths of its stretches stand in the held-out text. Licences and tables that honest
documents share make a few such windows; more than MOST of the set, or of the held-out tokens, is mixing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError, FileFormatError
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]
STRETCH = 16
STRETCHES = 16
WHOLE = 0.9
MOST = 0.05
_FACTORS = np.random.default_rng(0).integers(0, 2**63, STRETCH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def hashed(ids: Array) -> Array:
    """The hash of the stretch at every offset, (n - STRETCH + 1,) uint64; none for fewer tokens.

    Example:
        >>> both = hashed(np.arange(40))
        >>> len(both), bool(both[5] == hashed(np.arange(5, 40))[0])
        (25, True)
    """
    if len(ids) < STRETCH:
        return np.zeros(0, np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.int64).astype(np.uint64), STRETCH)
    total: Array = (rows * _FACTORS).sum(-1, dtype=np.uint64)
    return total


def _stretches(ids: Array) -> Array:
    """The hashes of a document or a piece of one; of one shorter than a stretch, that of the whole."""
    short = np.pad(np.asarray(ids, np.int64), (0, max(0, STRETCH - len(ids))), constant_values=-1)
    return hashed(short if len(ids) else short[:0])


def fingerprint(windows: Iterable[Sequence[Array]]) -> list[str]:
    """What each window is known by: its stretches' hashes, as base64; "" for a window without a stretch.

    Args:
        windows: of each, the tokens of the documents and pieces of documents in it.
    """
    found = []
    for parts in windows:
        # Spread over the window, so that a part of it is known as well.
        hashes = np.concatenate([np.zeros(0, np.uint64), *(_stretches(ids)[::STRETCH] for ids in parts)])
        places = np.unique(np.linspace(0, len(hashes) - 1, STRETCHES).astype(int)) if len(hashes) else []
        found.append(base64.b64encode(hashes[places].astype("<u8").tobytes()).decode() if len(hashes) else "")
    return found


def seen(fingerprints: Sequence[str], documents: Iterable[Array]) -> list[int]:
    """The windows that stand in the documents.

    Args:
        fingerprints: of `fingerprint`.
        documents: tokens of each held-out document.

    Raises:
        FileFormatError: a fingerprint is none.

    Example:
        >>> text = np.random.default_rng(0).integers(0, 1000, 300)
        >>> seen(fingerprint([[text[:64]], [np.arange(64)]]), [text[:200]])
        [0]
    """
    parts = [_stretches(np.asarray(ids)) for ids in documents]
    known = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    found = []
    for number, text in enumerate(fingerprints):
        try:
            hashes = np.frombuffer(base64.b64decode(text, validate=True), "<u8")
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"a calibration record's window {number} is damaged: {error}") from None
        if len(hashes) and len(known):
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            if (known[places] == hashes).mean() >= WHOLE:
                found.append(number)
    return found


def refuse_seen(record: Mapping[str, Any], documents: Sequence[Array], what: str) -> int:
    """Refuse held-out text that a calibration set was drawn from; returns how many windows stand in it all the same.

    Args:
        record: of a calibration set.
        documents: tokens of each held-out document.
        what: whose calibration it is, for the message.

    Raises:
        ArgumentError: the set, or the held-out text, stands in the other for more than MOST of it.
    """
    windows = record["stretches"]
    found = len(seen(windows, documents))
    blank = sum(not text for text in windows)
    if blank:
        logger.warning(
            "%s: %d of %d calibration windows hold no %d tokens of a document, and are not looked for in the held-out "
            "text", what, blank, len(windows), STRETCH,
        )  # fmt: skip
    tokens = found * record["tokens"] / max(1, len(windows))
    if found > MOST * len(windows) or tokens > MOST * sum(map(len, documents)):
        raise ArgumentError(
            f"{what}: {found} of {len(windows)} calibration windows stand in the held-out text, which would judge what "
            "it was fitted to. Give held-out documents of their own"
        )
    if found:
        logger.warning("%s: %d of %d calibration windows stand in the held-out text", what, found, len(windows))
    return found
