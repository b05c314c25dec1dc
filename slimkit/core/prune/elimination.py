"""Which inputs of some layers can go, and what that costs the model: backward elimination with exact refit.

A layer that reads x says W x. Without some of its inputs, and with the rest of its weights refitted, it says something
else; the model's loss rises by about half of the error's square, each output weighed by how much the loss depends on
it:

    L(S) = 1/2 sum_o s_o min_w E (W_o x - w x_kept)^2,      s_o = E (d loss / d y_o)^2

which is the optimal brain surgeon's saliency (Hassibi & Stork 1993, eq. 5) with a Kronecker-factored Hessian (Martens &
Grosse 2015, sec. 3; Kurtic et al. 2023, ZipLM, sec. 3.1). With P the inverse of E x x^T over the inputs still there,
an index that owns the inputs g costs 1/2 tr(P_gg^-1 W_g^T diag(s) W_g). The cheapest ones go, W and P are what a refit
leaves, and so on to the last. The order is one for all budgets: what a mild cut drops, a harder one drops too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ROUNDS = 48  # in how many steps all indices go; SmolLM2's perplexity is the same with twice as many
DAMPING = 1e-3  # of the mean square of the inputs, so that inputs that repeat one another have an inverse


@dataclass(frozen=True)
class LayerSignal:
    """What a layer is given, and how much the model's loss depends on what it says.

    Args:
        gram: (n_in, n_in) mean of the inputs' products with themselves.
        slope: (n_out,) mean square of the loss's derivative by each output, at one row.
        rows: number of rows that the means are of.
    """

    gram: Array
    slope: Array
    rows: int


@dataclass
class ChannelReader:
    """A layer that reads a variable.

    Args:
        weight: (n_out, n_in).
        signal: of this layer.
        owner: (n_in,) which index of the variable each input belongs to; -1 for none.
    """

    weight: Array
    signal: LayerSignal
    owner: Array


def eliminate(readers: Sequence[ChannelReader], size: int, rounds: int = ROUNDS, damping: float = DAMPING) -> Array:
    """The loss that the model has taken when each index has gone, all those before it gone too.

    Args:
        readers: the layers that read the variable.
        size: number of its indices.
        rounds: steps in which they go; more of them look again more often.
        damping: of the inputs, relative to their mean square.

    Returns:
        (size,) in the units of the loss, rising in the order in which the indices go; the last one's is the greatest.

    Example:
        >>> signal = LayerSignal(np.diag([4.0, 1.0, 1.0]), np.ones(1), 8)
        >>> eliminate([ChannelReader(np.array([[1.0, 1.0, 3.0]]), signal, np.arange(3))], 3).round(1).tolist()
        [2.5, 0.5, 7.0]
    """
    states = [_Reading(reader, size, damping) for reader in readers]
    lost, total = np.zeros(size), 0.0
    alive = np.arange(size)
    while len(alive):
        number = min(len(alive), max(1, -(-size // rounds)))
        cost = np.sum([state.costs(alive) for state in states], axis=0)
        going = alive[np.argsort(cost, kind="stable")[:number]]
        together = sum(state.drop(going) for state in states)
        # Within a step the loss rises by each one's own share.
        shares = np.maximum(np.sort(cost)[:number], 0)
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(number, 1 / number)
        lost[going] = total + together * np.cumsum(shares)
        total += together
        alive = np.setdiff1d(alive, going)
    return lost


class _Reading:
    """A reader as far as the elimination has come."""

    def __init__(self, reader: ChannelReader, size: int, damping: float) -> None:
        gram = np.asarray(reader.signal.gram, dtype=np.float64)
        ridge = damping * max(float(np.trace(gram)) / max(1, len(gram)), 1e-300)
        self.inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        # Outputs in the loss's own units: half of their squares is what is lost.
        self.weight = np.sqrt(0.5 * reader.signal.slope)[:, None] * np.asarray(reader.weight, dtype=np.float64)
        self.columns = np.arange(len(gram))
        self.owner = np.asarray(reader.owner)
        self.wide = np.bincount(self.owner[self.owner >= 0], minlength=size)

    def costs(self, alive: Array) -> Array:
        """What each index would cost alone, (alive,)."""
        found = np.zeros(len(self.wide))
        owner = self.owner[self.columns]
        for width in set(self.wide[alive].tolist()) - {0}:
            mine = alive[self.wide[alive] == width]
            place = np.flatnonzero(np.isin(owner, mine))
            place = place[np.argsort(owner[place], kind="stable")].reshape(len(mine), width)
            found[mine] = self._each(place)
        return found[alive]

    def _each(self, place: Array) -> Array:
        if place.shape[1] == 1:
            column = place[:, 0]
            return np.square(self.weight[:, column]).sum(axis=0) / self.inverse[column, column]
        parts = self.weight[:, place].transpose(1, 0, 2)  # (indices, n_out, width)
        inner = self.inverse[place[:, :, None], place[:, None, :]]
        return np.trace(np.linalg.solve(inner, parts.transpose(0, 2, 1) @ parts), axis1=1, axis2=2)

    def drop(self, going: Array) -> float:
        """Let some indices go; returns what they cost together."""
        here = np.isin(self.owner[self.columns], going)
        if not here.any():
            return 0.0
        gone, kept = np.flatnonzero(here), np.flatnonzero(~here)
        rows = self.inverse[gone]
        shift = np.linalg.solve(rows[:, gone], rows)  # (gone, all) what the kept inputs say of those gone, negated
        lost = self.weight[:, gone]
        cost = float(np.sum(lost * np.linalg.solve(rows[:, gone], lost.T).T))
        self.weight = self.weight[:, kept] - lost @ shift[:, kept]
        self.inverse = self.inverse[np.ix_(kept, kept)] - rows[:, kept].T @ shift[:, kept]
        self.columns = self.columns[kept]
        return max(cost, 0.0)
