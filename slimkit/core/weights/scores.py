"""How much each channel and head of a large transformer counts, by its weights and by what runs through them."""

from __future__ import annotations

import numpy as np

from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import PlanError
from slimkit.core.weights.coupling import AxisUse, WeightCoupling
from slimkit.core.weights.heads import Kept

_BLOCK = 1 << 18  # values squared at a time


class Scores:
    """Energy of every channel, gathered tensor by tensor.

    A channel of a width that is normalised counts by the scales its norms give it; any other by the larger of two
    norms, of the weights that write it and of those that read it, each relative to its mean over the width. A head
    counts by the products that attention makes with it, value with output and query with key. Measured on MiniLM,
    these keep more of the output than the products of all norms do.

    Where activations are given, a channel counts by what it brings to the layers that read it: the mean square of its
    values times the squared norm of the weights that meet them (Wanda, Sun et al. 2023, sec. 3; FLAP, An et al. 2023,
    sec. 4), and a head by the sum over its channels.
    """

    def __init__(self, coupling: WeightCoupling) -> None:
        self._coupling = coupling
        self._width: dict[tuple[str, str], Array] = {}
        self._rows: dict[tuple[str, str], Array] = {}
        self._seen: dict[str, Array] = {}

    def add(self, name: str, values: Array, activation: Array | None = None) -> None:
        """Add one tensor's energy to the variables its axes use.

        Args:
            name: the tensor's, in the model.
            values: the whole tensor of the file.
            activation: the mean square of each of its input channels, where it was measured.
        """
        uses = self._coupling.uses[name]
        for axis, use in enumerate(uses):
            if use is None:
                continue
            energy = squares(values, axis)
            if activation is not None and use.side in ("consumer", "out"):
                self._add_seen(name, use, energy, activation)
            if use.variable in self._coupling.attentions:
                self._add_rows(use, energy)
                continue
            energy = energy.reshape(use.parts, -1).sum(axis=0)
            if use.variable.startswith("width:"):
                # One tensor, one vote: the embedding table must not outweigh twelve layers.
                energy = energy * (len(energy) / (energy.sum() or 1.0))
            key = (use.variable, use.side)
            self._width[key] = self._width[key] + energy if key in self._width else energy

    def _add_seen(self, name: str, use: AxisUse, energy: Array, activation: Array) -> None:
        if len(activation) != len(energy):
            raise PlanError(
                f"{name}: the activations are of {len(activation)} input channels, the file has {len(energy)}. "
                "Measure them on the file's own model."
            )
        seen = energy * activation
        if use.variable.startswith("width:"):
            seen = seen * (len(seen) / (seen.sum() or 1.0))  # as many votes as any other layer
        self._seen[use.variable] = self._seen[use.variable] + seen if use.variable in self._seen else seen

    def told_by(self, variable: str) -> str:
        """What the scores of a width or an attention layer rest on: "activations" or "importance" (weights)."""
        return "activations" if variable in self._seen else "importance"

    def _add_rows(self, use: AxisUse, energy: Array) -> None:
        attention = self._coupling.attentions[use.variable]
        if use.side in ("fused", "grouped"):
            every = Kept.all(attention)
            for role in ("query", "key", "value"):
                part = energy[every.part(role)]
                self._sum((use.variable, role), part)
        else:
            self._sum((use.variable, use.side), energy)

    def _sum(self, key: tuple[str, str], energy: Array) -> None:
        self._rows[key] = self._rows[key] + energy if key in self._rows else energy

    def width(self, key: str) -> Array:
        """One score per channel of a width: what readers get; its norms' scale; how much it is written or read."""
        if key in self._seen:
            return self._seen[key]
        size = self._coupling.widths[key].source
        written, read, scale = (self._width.get((key, s), np.ones(size)) for s in ("producer", "consumer", "scale"))
        if np.ptp(scale):
            return scale
        return np.maximum(_relative(written), _relative(read))

    def attention(self, path: str) -> dict[str, Array]:
        """Scores per query head and channel of the head.

        "value" for value-output, "query" for query-key, and where activations are given, "seen" for the output alone.
        """
        attention = self._coupling.attentions[path]
        n_q, n_k, size = attention.source.queries, attention.source.keys or 1, attention.source.size or 1
        shape = {"query": (n_q, size), "out": (n_q, size), "key": (n_k, size), "value": (n_k, size)}
        rows = {r: self._rows.get((path, r), np.ones(s[0] * size)).reshape(s) for r, s in shape.items()}
        share = n_q // n_k
        found = {
            "value": np.sqrt(np.repeat(rows["value"], share, axis=0) * rows["out"]),
            "query": np.sqrt(rows["query"] * np.repeat(rows["key"], share, axis=0)),
        }
        if path in self._seen:
            found["seen"] = self._seen[path].reshape(n_q, size) / (float(self._seen[path].mean()) or 1.0)
        return found


def _relative(energy: Array) -> Array:
    """Norms with mean 1."""
    norm = np.sqrt(energy)
    return norm / (float(norm.mean()) or 1.0)


def squares(values: Array, axis: int) -> Array:
    """Sum of squares over all other axes, in float64 whatever the file holds, without a float64 copy of the whole.

    Example:
        >>> squares(np.array([[1.0, 2.0], [3.0, 4.0]]), 0)
        array([ 5., 25.])
    """
    others = tuple(a for a in range(values.ndim) if a != axis)
    total = np.zeros(values.shape[axis])
    rows = max(1, _BLOCK * len(values) // max(1, values.size))
    for at in range(0, len(values), rows):
        block = values[at : at + rows].astype(np.float64)
        part = np.sum(np.square(block, out=block), axis=others)
        if axis == 0:
            total[at : at + rows] = part
        else:
            total += part
    return total
