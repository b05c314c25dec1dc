"""Between which values the inputs of layers lie, and what one step for all of them changes of the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core import batch as batches
from slimkit.core.ascend.folder import Array
from slimkit.core.ascend.int8 import Int8Layer
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import to_numpy

RANGES = ("minmax", "percentile")

# Of "percentile": this share of a batch's values lies below the low or above the high end, the batches' mean taken.
TAIL = 1e-4
# Of each batch so many rows of a layer's inputs are kept, evenly spread, to see what rounding them changes.
ROWS = 16
# Of all batches together; every layer's are held to the end.
MOST_ROWS = 256


@dataclass
class Inputs:
    """What calibration shows of a layer's inputs.

    Args:
        low, high: between which values they lie.
        rows: (rows, k) float32, some of them.
    """

    low: float
    high: float
    rows: Array


def inputs_of(host: SparseFramework, dataset: Any, names: Iterable[str], how: str) -> dict[str, Inputs]:
    """Between which values each layer's inputs lie, padding apart; layers that share one input have one range.

    Args:
        host: the model.
        dataset: a re-iterable of batches.
        names: linear layers.
        how: "minmax", or "percentile": all but `TAIL` of a batch's values on either side, the batches' mean.

    Returns:
        Those that a batch has reached, by layer.
    """
    names = list(names)
    found: dict[str, Inputs] = {}
    for stage in host.stages(batches.Steady(batches.dataset(dataset)), names, False):
        ends: dict[str, list[tuple[float, float]]] = {}
        rows: dict[str, list[Array]] = {}

        def seen(
            name: str,
            x: Any,
            *_: Any,
            ends: dict[str, list[tuple[float, float]]] = ends,
            rows: dict[str, list[Array]] = rows,
        ) -> None:
            values = to_numpy(x).astype(np.float32)
            if values.size:
                flat = values.reshape(-1, values.shape[-1])
                tails = np.quantile(values, (TAIL, 1 - TAIL)) if how == "percentile" else (values.min(), values.max())
                ends.setdefault(name, []).append((float(tails[0]), float(tails[1])))
                # Copies: a view would hold the whole batch.
                rows.setdefault(name, []).append(flat[np.linspace(0, len(flat) - 1, min(ROWS, len(flat))).astype(int)])

        if stage.feeds:
            stage.replay([feed[0] for feed in stage.feeds], seen)
        for feed in stage.feeds:
            if feed[0] in ends:
                lows, highs = zip(*ends[feed[0]], strict=True)
                least, most = (np.mean, np.mean) if how == "percentile" else (min, max)
                shown = Inputs(float(least(lows)), float(most(highs)), _few(np.concatenate(rows[feed[0]])))
                found.update(dict.fromkeys((name for name in feed if name in names), shown))
        stage.advance()
    return found


def _few(rows: Array) -> Array:
    """`MOST_ROWS` of the rows at most, drawn: a step through them would meet the same place of every batch."""
    if len(rows) <= MOST_ROWS:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), MOST_ROWS, replace=False))]


def input_error(layer: Int8Layer, weight: Array, rows: Array) -> float:
    """What rounding its inputs changes of a layer's answers, as a share of them.

    The larger of two: in the median of rows, and over all rows together. A step that is wide enough for a few huge rows
    (the first tokens of a language model) rounds the others to nothing, which the first sees; one that cuts the huge
    rows off loses what all other tokens attend to, which the second sees.

    The bias is no part of the answers here: it does not depend on the inputs.

    Args:
        layer: the layer on the device.
        weight: (n, k) as it was.
        rows: (rows, k) inputs; those of zeros do not count.

    Example:
        >>> from slimkit.core.ascend.int8 import int8_layer
        >>> narrow, wide = (int8_layer("fc", np.eye(2), None, -top, top) for top in (1.0, 100.0))
        >>> rows = np.array([[0.3, 0.7]], np.float32)
        >>> input_error(narrow, np.eye(2), rows) < 0.01 < input_error(wide, np.eye(2), rows)
        True
    """
    wide = np.asarray(weight, np.float32)
    step = layer.input_scale.astype(np.float32)
    rounded = (layer.inputs(rows).astype(np.float32) - layer.input_offset.astype(np.float32)) * step  # (rows, k)
    answers = np.linalg.norm(rows @ wide.T, axis=1)  # (rows,)
    changed = np.linalg.norm((rounded - rows) @ wide.T, axis=1)
    seen = answers > 0
    if not seen.any():
        return 0.0
    return float(max(np.median(changed[seen] / answers[seen]), np.linalg.norm(changed) / np.linalg.norm(answers)))
