"""Smoothing: inputs of int8 layers whose channels lie closer together, and weights that make up for it exactly.

One step serves all inputs of an int8 layer, so that a few loud channels round the others to nothing. A channel that is
written s times smaller by whatever writes it, and read by weights s times larger, changes nothing (`core.prune.scaling`
finds who does either), and the step shrinks (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, sec. 4). How far, one
number says for each place, as in Outlier Suppression+ (Wei et al. 2023, arXiv 2304.09145, sec. 4.2): channels whose
largest input is above a limit are brought down to it,

    s_j = max(1, max |x_j| / limit),    limit = max |x| 2^-k,    k = 0 .. 8,

and the limit is the one whose layers, weights and inputs rounded, answer most nearly as before. Every s is rounded up
to a power of two, so that the floats of the model compute the same bits as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimkit.core.ascend.folder import Array
from slimkit.core.ascend.inputs import Inputs, inputs_of
from slimkit.core.ascend.int8 import input_step
from slimkit.core.errors import UnsupportedError
from slimkit.core.log import logger
from slimkit.core.prune.moves import NONE
from slimkit.core.prune.scaling import Ends, scalable
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import to_numpy
from slimkit.core.sparse.maths.grid import IntegerGrid, steps_of
from slimkit.core.sparse.maths.moments import SPOILT, SpoiltError

LIMITS = tuple(range(9))  # k
ROWS = 128  # of a layer's inputs, on which limits are judged
# What a model's answers may change by, in float16; powers of two change nothing but what underflows.
SAME = 1e-3


def smooth(host: SparseFramework, dataset: Any, names: Sequence[str]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Bring the channels of some layers' inputs closer together, in place; the model says what it said before.

    Args:
        host: the model.
        dataset: batches.
        names: layers that will be int8.

    Returns:
        What the report says, and a call that takes it back. The report: "smoothed", layer -> {"factor": the largest s,
        "error": [before, after], the share of the answers that rounding changes}, and "unsmoothed", the other layers.

    Raises:
        GraphError: the model does not run on the first batch.
        UnsupportedError: scaled channels are read by something that the first batch does not show.
    """
    logger.warning(
        "smooth=True made the one language model that it was measured on far worse (SmolLM2-135M: perplexity 57.2, and "
        "18.3 without it): compare both before you serve what comes out"
    )
    batch = next(iter(dataset))
    layers = {f"{name}.weight": name for name in names}
    found = scalable(host.graph(batch))
    places = [[e for e in place if e.path in layers and e.axis == 1] for place in found.places()]
    inputs = _all_inputs(host, dataset, [layers[e.path] for place in places for e in place])
    powers = np.zeros(1 + max((int(e.channels.max(initial=NONE)) for e in found.writers), default=0), np.int64)
    smoothed: dict[str, dict[str, Any]] = {}
    for place in places:
        if place := [e for e in place if layers[e.path] in inputs]:
            weights = [to_numpy(host.weight(layers[e.path])).astype(np.float32) for e in place]
            rounding = Rounding([e.channels for e in place], weights, [inputs[layers[e.path]] for e in place])
            errors = host.gather([rounding.error(rounding.powers(k)) for k in LIMITS])[0]
            own = rounding.powers(LIMITS[int(np.argmin(errors))])
            powers[rounding.channels] = own
            row = {"factor": float(2.0 ** own.max()), "error": [errors[0], min(errors)]}
            smoothed.update((layers[e.path], row) for e in place)
    before = host.outputs(batch)
    undo = host.rescale(_changes(found.writers, powers, -1), _changes(found.readers, powers, 1))
    try:
        moved = np.linalg.norm(host.outputs(batch) - before) / max(float(np.linalg.norm(before)), 1e-30)
        if not max(host.gather(float(moved))) < SAME:
            raise UnsupportedError(
                f"smooth=True changes what the model says by {moved:.2g} of it: something reads the scaled channels "
                "that a trace of the first batch does not show. Leave smooth out"
            )
    except BaseException:
        undo()
        raise
    left = [name for name in names if name not in smoothed]
    if left:
        logger.info("smoothing: the inputs of %d of %d layers have to stay as they are", len(left), len(names))
    return {"smoothed": smoothed, "unsmoothed": left}, undo


class Rounding:
    """What int8 changes of the answers of layers that read the same channels.

    Args:
        reads: for each layer (k,) the channel of each of its inputs, -1 for one that keeps its scale.
        weights: (n, k) each.
        inputs: of each.

    Attributes:
        channels: those that are read, ascending.

    Example:
        >>> x = np.array([[100.0, 0.4], [-90.0, 0.7]], np.float32)
        >>> shown = Inputs(-90.0, 100.0, x.min(0), x.max(0), x)
        >>> rounding = Rounding([np.array([0, 1])], [np.array([[0.01, 1.0]], np.float32)], [shown])
        >>> rounding.powers(4).tolist(), rounding.error(rounding.powers(4)) < 0.1 < rounding.error(rounding.powers(0))
        ([4, 0], True)
    """

    def __init__(self, reads: Sequence[Array], weights: Sequence[Array], inputs: Sequence[Inputs]) -> None:
        self.channels = np.unique(np.concatenate([own[own != NONE] for own in reads]))
        # For each input the place of its channel among them; one more stands for what keeps its scale.
        self._places = [np.where(own == NONE, len(self.channels), np.searchsorted(self.channels, own)) for own in reads]
        self._weights, self._inputs = weights, inputs
        self._rows = [shown.rows[:: -(-len(shown.rows) // ROWS)] for shown in inputs]
        tops = np.zeros(len(self.channels) + 1)
        for places, shown in zip(self._places, inputs):
            np.maximum.at(tops, places, np.maximum(np.abs(shown.lows), np.abs(shown.highs)))
        self._tops = tops[:-1]
        self._answers = [rows @ weight.T for rows, weight in zip(self._rows, weights)]

    def powers(self, k: int) -> Array:
        """(channels,) whole numbers: s = 2^p with the limit 2^-k of the largest input."""
        limit = max(float(self._tops.max()), 1e-30) * 2.0**-k
        return np.ceil(np.log2(np.maximum(self._tops / limit, 1.0))).astype(np.int64)

    def error(self, powers: Array) -> float:
        """The share of the answers that rounding weights and inputs changes, as `input_error` counts it."""
        factors = np.append(2.0**powers, 1.0).astype(np.float32)
        changed, answered = [], []
        for places, weight, shown, rows, exact in zip(
            self._places, self._weights, self._inputs, self._rows, self._answers
        ):
            own = factors[places]  # (k,)
            try:
                step, zero = input_step(float((shown.lows / own).min()), float((shown.highs / own).max()))
            except OverflowError:
                return float("inf")
            wide = weight * own
            rounded = IntegerGrid(steps_of(wide, 8), 8).nearest(wide)  # (n, k)
            whole = np.clip(np.round(rows / own / float(step) + zero), -128, 127) - zero  # (rows, k)
            changed.append(np.square((whole * float(step)).astype(np.float32) @ rounded.T - exact).sum(axis=1))
            answered.append(np.square(exact).sum(axis=1))
        lost, said = (np.sum(one, axis=0) for one in (changed, answered))  # (rows,)
        seen = said > 0
        if not seen.any():
            return 0.0
        return float(np.sqrt(max(np.median(lost[seen] / said[seen]), lost.sum() / said.sum())))


def _all_inputs(host: SparseFramework, dataset: Any, names: Sequence[str]) -> dict[str, Inputs]:
    """What the batches of all processes show of layers' inputs; the rows are this process's."""
    found = inputs_of(host, dataset, names, "minmax") if names else {}
    for name, own in found.items():
        told = host.gather([own.lows.tolist(), own.highs.tolist()])
        own.lows = np.min([lows for lows, _ in told], axis=0)
        own.highs = np.max([highs for _, highs in told], axis=0)
        if not (np.isfinite(own.lows).all() and np.isfinite(own.highs).all()):
            raise SpoiltError(f"{SPOILT} at the input of {name!r}")
    return found


def _changes(ends: Sequence[Ends], powers: Array, sign: int) -> dict[str, tuple[int, Array]]:
    """Parameter -> the axis and the power of two of each of its indices, where one is not zero."""
    made = {e.path: (e.axis, sign * np.where(e.channels == NONE, 0, powers[e.channels])) for e in ends}
    return {path: (axis, own) for path, (axis, own) in made.items() if own.any()}
