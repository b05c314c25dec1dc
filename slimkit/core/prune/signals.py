"""What calibration tells of layers, gathered: second moments of their inputs, mean squares of their outputs' slopes."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimkit.core.errors import ArgumentError
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal

Array = np.ndarray[Any, Any]


class SignalSums:
    """Sums over calibration batches.

    Args:
        seed: of `random`.

    Attributes:
        random: draws the signs that are sent back.

    Example:
        >>> sums = SignalSums(0)
        >>> sums.given("fc", np.array([[8.0]]), 2)
        >>> sums.sloped("fc", np.array([6.0]))
        >>> sums.answered(2)
        >>> sums.means()["fc"]
        LayerSignal(gram=array([[4.]]), slope=array([3.]), rows=2)
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._grams: dict[str, Array] = {}
        self._rows: dict[str, int] = {}
        self._slopes: dict[str, Array] = {}
        self._experts: dict[str, Array] = {}
        self._answers = 0

    def given(self, path: str, gram: Array, rows: int) -> None:
        """A layer was given so many rows, with this sum of their products with themselves."""
        self._grams[path] = self._grams[path] + gram if path in self._grams else gram
        self._rows[path] = self._rows.get(path, 0) + rows

    def routed(self, path: str, squares: Array, rows: int) -> None:
        """Experts were given some of so many tokens: the sum of squares as `ExpertSignal` holds it."""
        self._experts[path] = self._experts[path] + squares if path in self._experts else squares
        self._rows[path] = self._rows.get(path, 0) + rows

    def sloped(self, path: str, squares: Array) -> None:
        """The sum of squares of the loss's derivatives by each of a layer's outputs."""
        self._slopes[path] = self._slopes[path] + squares if path in self._slopes else squares

    def answered(self, rows: int) -> None:
        """The loss was a sum over so many answers."""
        self._answers += rows

    def means(self) -> dict[str, LayerSignal]:
        """Layer that is a plain product -> its signal; one that no batch reached, or that the loss does not depend on,
        is left out.

        Raises:
            ArgumentError: infinity or NaN among the numbers.
        """
        for path, gram in self._grams.items():
            demand_finite(path, gram)
            demand_finite(path, self._slopes.get(path, gram))
        return {
            path: LayerSignal(gram / self._rows[path], self._slopes[path] / self._answers, self._rows[path])
            for path, gram in self._grams.items()
            if self._rows[path] and path in self._slopes
        }

    def expert_means(self) -> dict[str, ExpertSignal]:
        """Module that holds experts -> their signal; as `means`.

        Raises:
            ArgumentError: infinity or NaN among the numbers.
        """
        for path, squares in self._experts.items():
            demand_finite(path, squares, self._slopes.get(path, squares))
        return {
            path: ExpertSignal(squares, self._slopes[path] / self._answers, self._rows[path])
            for path, squares in self._experts.items()
            if self._rows[path] and path in self._slopes
        }


def demand_finite(path: str, *sums: Array) -> None:
    """Refuse sums over calibration data that hold infinity or NaN: nothing can be told of a layer from them.

    Raises:
        ArgumentError: they do.
    """
    if not all(np.isfinite(total).all() for total in sums):
        raise ArgumentError(
            f"calibration gives the layer {path} infinity or NaN: the batches hold such numbers, or the model makes "
            "them (float16 overflows where bfloat16 and float32 do not)"
        )


def sent_back(random: np.random.Generator, logits: Array | None, shape: tuple[int, ...]) -> Array:
    """What is sent back through a model so that the squares of the slopes are its loss's second derivative.

    That of a square is the identity, whose root are signs. That of the divergence between answers with the shares p is
    diag(p) - p p^T, whose root takes signs s to sqrt(p) s - p (sqrt(p) . s).

    Args:
        random: draws the signs, the same in every framework.
        logits: (..., n) of the answers; None for a square.
        shape: of the answers.

    Returns:
        float32, of that shape.

    Example:
        >>> sent_back(np.random.default_rng(0), None, (1, 4)).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    number = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(random.bytes(-(-number // 8)), dtype=np.uint8), count=number)
    signs: Array = (bits.astype(np.float32) * 2 - 1).reshape(shape)
    if logits is None:
        return signs
    share = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    share /= share.sum(axis=-1, keepdims=True)
    root = np.sqrt(share) * signs
    return root - share * root.sum(axis=-1, keepdims=True)
