"""Windows of tokens drawn from documents: across a whole file, by document, packed or padded.

Documents are visited in a random order. In each round a document that fills a window gives one piece of itself, at a
random place, and no token twice; a round begins when all documents have been visited. Shorter documents are packed, or
each is padded by itself:

packed  documents one after the other, an end-of-text token behind each; a window goes on where the last one ended
padded  a window a document, filled up with padding that the mask leaves out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.calibration.apart import STRETCH
from slimkit.core.errors import ArgumentError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DrawnWindows:
    """What was drawn from one source.

    Args:
        windows: tokens of each, (at most length,) int64, without padding.
        documents: numbers of the documents that gave some of them.
        parts: of each window, the stretches of documents in it that can be looked for in other text: whole documents,
            and pieces of STRETCH tokens or more.
    """

    windows: list[Array]
    documents: list[int]
    parts: list[list[Array]]


@dataclass(frozen=True)
class WindowForm:
    """What a window looks like.

    Args:
        length: tokens, with the one in front.
        pack: whether short documents are packed, or padded one by one.
        first: token in front of each window (beginning of sequence), or None.
        separator: token behind each packed document (end of text), or None.
    """

    length: int
    pack: bool
    first: int | None = None
    separator: int | None = None

    @property
    def room(self) -> int:
        """Tokens of documents in a window."""
        return self.length - (self.first is not None)

    def window(self, ids: Sequence[int] | Array) -> Array:
        """Tokens with the one in front."""
        front = [] if self.first is None else [self.first]
        return np.concatenate([np.asarray(front, np.int64), np.asarray(ids, np.int64)])


def draw(
    documents: Sequence[Any], encode: Callable[[Any, str], Array], n: int, form: WindowForm, seed: Any, name: str
) -> DrawnWindows:
    """Draw windows across all documents.

    Args:
        documents: of one source.
        encode: (document, its name) -> tokens.
        n: windows wanted; fewer come where the documents hold no more.
        form: of the windows.
        seed: of the order and of the places, as `numpy.random.default_rng` takes it.
        name: of the source, for messages.

    Example:
        >>> form = WindowForm(4, pack=True, separator=0)
        >>> [w.tolist() for w in draw([[1, 2], [3, 3, 3]], lambda d, _: np.array(d), 9, form, 0, "x").windows]
        [[1, 2, 0, 3], [3, 3, 0]]
    """
    rng = np.random.default_rng(seed)
    sizes: dict[int, int] = {}
    pieces = _pieces(documents, encode, form, rng, name, sizes)
    windows: list[Array] = []
    used: dict[int, None] = {}
    parts: list[list[Array]] = []
    for ids, came in pieces:
        windows.append(form.window(ids))
        found = [(at, ids[came == at]) for at in dict.fromkeys(came[came >= 0].tolist())]
        used.update(dict.fromkeys(at for at, _ in found))
        parts.append([part for at, part in found if len(part) >= min(STRETCH, sizes[at])])
        if len(windows) == n:
            break
    if not windows:
        raise ArgumentError(f"{name} must hold a document of two tokens or more. Received: none")
    return DrawnWindows(windows, sorted(used), parts)


def _pieces(
    documents: Sequence[Any],
    encode: Callable[[Any, str], Array],
    form: WindowForm,
    rng: np.random.Generator,
    name: str,
    sizes: dict[int, int],
) -> Iterator[tuple[Array, Array]]:
    """Pieces of at most `room` tokens, each with the number of the document that each token comes from, or -1.

    How many tokens a document has is noted in `sizes`.
    """
    left: dict[int, list[Array]] = {}
    held = came = np.zeros(0, np.int64)
    for at in rng.permutation(len(documents)).tolist():
        ids = encode(documents[at], f"{name}[{at}]")
        sizes[at] = len(ids)
        if len(ids) >= form.room:
            first, *left[at] = _cut(ids, form.room, rng)
            yield first, np.full(len(first), at)
        elif len(ids) >= 2 and not form.pack:
            yield ids, np.full(len(ids), at)
        elif len(ids) >= 2:
            held, came = np.append(held, ids), np.append(came, np.full(len(ids), at))
            if form.separator is not None:
                held, came = np.append(held, form.separator), np.append(came, -1)
            while len(held) >= form.room:
                yield held[: form.room], came[: form.room]
                held, came = held[form.room :], came[form.room :]
    while left:
        for at in rng.permutation(list(left)).tolist():
            if not left[at]:
                del left[at]
                continue
            piece = left[at].pop()
            yield piece, np.full(len(piece), at)
    # What is left of the short documents fills no window: it comes last, and is padded.
    if len(held) >= 2:
        yield held, came


def _cut(ids: Array, room: int, rng: np.random.Generator) -> list[Array]:
    """A long document as whole windows from a random first place on, in random order."""
    phase = int(rng.integers(0, len(ids) % room + 1))
    places = phase + room * rng.permutation(len(ids) // room)
    return [ids[place : place + room] for place in places.tolist()]


def shares(weights: Sequence[float], n: int) -> list[int]:
    """Windows of each source by its weight, the largest remainders rounded up; at least one each.

    Example:
        >>> shares([2, 1], 8), shares([100, 1], 4)
        ([5, 3], [3, 1])
    """
    if n < len(weights):
        raise ArgumentError(f"n must be at least one window for each of {len(weights)} sources. Received: {n}")
    exact = np.asarray(weights, float) / sum(weights) * n
    counts = np.maximum(1, np.floor(exact).astype(int))
    while counts.sum() != n:
        gap = exact - counts
        if counts.sum() < n:
            counts[int(gap.argmax())] += 1
        else:
            counts[int(np.where(counts > 1, gap, np.inf).argmin())] -= 1
    return [int(c) for c in counts]
