"""Small deltas fitted to what layers are given, one block of layers after the other.

A layer of the small model is given y where the tuned one is given x, by the errors of the layers before it. Over the
rows of calibration data, with T the tuned weight and B the base's (outputs, inputs), G = sum y y' and C = sum x y':

    R   = T - B + T (C - G) G^-1        what the delta should be: B + R answers y as T answers x   (least squares)
    b a = the nearest of its rank to R where errors count as G says: from the singular vectors of R L, G = L L'
    s   = the signs of R - b a, column by column, later columns making up for the errors of earlier ones
    f   = each row's scale: (s G r') / (s G s'), r the row of R - b a
    bias: the difference of the mean answers

Every row counts as it is, the first token of a language model too, which may be hundreds of times as long as others:
bounded as in the sparse methods' moments, answers came no nearer (docs/numbers.md).

Sources: Liu et al. 2024, "BitDelta" (signs with scales); Yao et al. 2025, "DeltaZip" (deltas fitted to activations);
Frantar et al. 2023, "OPTQ", section 3 (the sweep over columns).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slimkit.core.delta import rest
from slimkit.core.delta.framework import DeltaFramework
from slimkit.core.errors import ArgumentError

Array = np.ndarray[Any, Any]

# Of the mean square of an input: what each counts beside what the data says, so that inputs that were silent there
# do not get any weight whatever.
DAMPING = 0.1
# Columns that hear of each other's errors one by one; a product carries them to the rest of the matrix.
_BLOCK = 64
_TURNS = 2  # of signs and scales, each for the other


class PairedMoments:
    """Moments of what one layer is given in the tuned model and in the small one, over the same rows."""

    def __init__(self) -> None:
        self.count = 0
        self.gram: Array = np.zeros((0, 0), np.float32)
        self.cross, self.tuned_total, self.own_total = self.gram, self.gram[:0], self.gram[:0]

    def add(self, tuned: Array, own: Array) -> None:
        """Take (n, inputs) of each in."""
        if not self.count:
            width = own.shape[1]
            self.gram, self.cross = (np.zeros((width, width), np.float32) for _ in range(2))
            self.tuned_total, self.own_total = (np.zeros(width) for _ in range(2))
        self.count += len(own)
        self.gram += own.T @ own
        self.cross += tuned.T @ own
        self.tuned_total += tuned.sum(0, dtype=np.float64)
        self.own_total += own.sum(0, dtype=np.float64)


class FittedDelta(NamedTuple):
    """One layer's delta: its parts, its bias or None, and the relative error of its answers."""

    parts: dict[str, Array]
    bias: Array | None
    error: float


def blocks(paths: Sequence[str]) -> list[list[str]]:
    """Layers in order, those of one block together: the layers below the first number of a path.

    Example:
        >>> blocks(["layers.0.q", "layers.0.k", "layers.1.q", "head"])
        [['layers.0.q', 'layers.0.k'], ['layers.1.q'], ['head']]
    """

    def block(path: str) -> str:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        return ".".join(parts[: at + 1])

    return [list(group) for _, group in itertools.groupby(paths, block)]


def read(
    access: DeltaFramework, model: Any, tuned: Any, paths: Sequence[str], batches: Sequence[Any]
) -> dict[str, PairedMoments]:
    """Path -> moments of some layers, those left out that the two models do not give the same rows.

    Args:
        access: the wing.
        model: the small model, as far as it is made.
        tuned: the tuned one.
        paths: the layers.
        batches: calibration data.
    """
    found = {path: PairedMoments() for path in paths}
    for batch in batches:
        given: list[dict[str, list[Array]]] = []
        for one in (tuned, model):
            held: dict[str, list[Array]] = {path: [] for path in paths}

            def seen(path: str, rows: Array, held: dict[str, list[Array]] = held) -> None:
                held[path].append(rows)

            access.given(one, paths, [batch], seen)
            given.append(held)
        for path in list(found):
            shapes = [[rows.shape for rows in held[path]] for held in given]
            if shapes[0] != shapes[1]:  # experts that the two choose for different tokens
                del found[path]
            elif shapes[0]:
                found[path].add(*(np.concatenate(held[path]) for held in given))
    return {path: pairs for path, pairs in found.items() if pairs.count}


def solve(
    base: Array, tuned: Array, bias: Array | None, pairs: PairedMoments, kind: str, rank: int, rng: np.random.Generator
) -> FittedDelta | None:
    """The delta of one linear layer by its moments; None where they say nothing.

    Args:
        base: (outputs, inputs), float32.
        tuned: the same of the tuned model.
        bias: (outputs,) of the tuned model, or None.
        pairs: the moments.
        kind: what the delta holds beside its low rank, "signs" or nothing; see `rest.PARTS`.
        rank: of the low rank.
        rng: for the decomposition of large weights.

    Raises:
        ArgumentError: the data is not finite.
    """
    means = np.zeros((2, len(pairs.own_total)))
    gram, cross = (m.astype(np.float64) / pairs.count for m in (pairs.gram, pairs.cross))
    square = float(np.trace(gram)) / len(gram)
    if not np.isfinite(square) or not np.isfinite(cross).all():
        raise ArgumentError("calibration must give finite inputs to every layer. Received: NaN or infinity")
    if square == 0:
        return None
    if bias is not None:  # it says what is the same for all rows
        means = np.stack((pairs.tuned_total, pairs.own_total)) / pairs.count
        gram, cross = gram - np.outer(means[1], means[1]), cross - np.outer(means[0], means[1])
    # Of inputs that are nearly the same for all rows the sums leave little but what float32 rounds.
    damping = max(DAMPING * float(np.trace(gram)) / len(gram), 1e-4 * square)
    gram[np.diag_indices_from(gram)] += damping
    cross[np.diag_indices_from(cross)] += damping
    change = tuned - base
    wanted = (change + np.linalg.solve(gram, (cross - gram).T @ tuned.T.astype(np.float64)).T).astype(np.float32)
    root = np.linalg.cholesky(gram)
    a, b = _nearest(wanted, root, rank, rng)
    low = b.astype(np.float32) @ a.astype(np.float32)
    parts: dict[str, Array] = {"a": a, "b": b}
    made = low
    if kind == "signs":
        signs, scale = swept(wanted - low, gram)
        parts |= {"signs": np.packbits(signs, axis=1, bitorder="little"), "scale": scale}
        made = low + np.where(signs, scale[:, None], -scale[:, None])
    if bias is not None:
        bias = bias + tuned @ means[0] - (base + made) @ means[1]
    whole = float(np.linalg.norm(change @ root))
    return FittedDelta(parts, bias, round(float(np.linalg.norm((wanted - made) @ root)) / max(whole, 1e-30), 4))


def _nearest(change: Array, root: Array, rank: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """a (rank, in) and b (out, rank) in float16: about the nearest to a change where errors E cost |E root|^2."""
    a, b = rest.leading((change @ root).astype(np.float32), rank, rng)
    a = np.linalg.solve(root.T, a.T.astype(np.float64)).T
    # Both halves of about one size: float16 has few numbers.
    even = float(np.sqrt(float(np.abs(a).max()) / max(float(np.abs(b).max()), 1e-30))) or 1.0
    return (a / even).astype(np.float16), (b * even).astype(np.float16)


def swept(change: Array, gram: Array) -> tuple[Array, Array]:
    """The signs of a change (outputs, inputs), True for +, and each row's scale, where errors E cost tr(E G E').

    The signs alone are nearest entry by entry. Here the columns are taken in turn, and those still to come make up for
    what the ones before could not say.

    Args:
        change: float32.
        gram: (inputs, inputs) G, positive definite.

    Example:
        >>> signs, scale = swept(np.array([[1.0, -3.0]], np.float32), np.eye(2))
        >>> signs.tolist(), scale.tolist()
        ([[True, False]], [2.0])
    """
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T.astype(np.float32)
    gram = gram.astype(np.float32)
    scale = np.abs(change).mean(1)
    signs = change >= 0
    for _ in range(_TURNS):
        signs = _signs(change, upper, scale)
        row = np.where(signs, 1, -1).astype(np.float32)
        told = row @ gram
        # A scale below zero would turn the signs around.
        scale = np.maximum((told * change).sum(1) / (told * row).sum(1), 0)
    return signs, scale.astype(np.float32)


def _signs(change: Array, upper: Array, scale: Array) -> Array:
    """One pass over the columns; upper (inputs, inputs) is the upper factor of the inverse of G."""
    left = np.ascontiguousarray(change.T)  # a column in one piece
    signs = np.empty(left.shape, bool)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for j in range(start, stop):
            left[j] -= upper[start:j, j] @ errors[: j - start]
            signs[j] = left[j] >= 0
            errors[j - start] = (left[j] - np.where(signs[j], scale, -scale)) / upper[j, j]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return signs.T


def fit(
    access: DeltaFramework, model: Any, tuned: Any, layers: Mapping[str, Any], batches: Sequence[Any]
) -> Iterator[tuple[str, PairedMoments | None]]:
    """Path and moments of layers, block by block in order; what was filled in for one block is seen by the next.

    None stands for a layer that the data says nothing comparable of.
    """
    for block in blocks(list(layers)):
        found = read(access, model, tuned, block, batches)
        for path in block:
            yield path, found.get(path)
