"""Least-squares repair of a cut layer from second moments: kept weights learn to say what dropped ones said."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from slimkit.core.log import progress
from slimkit.core.prune.plan import PrunePlan

Array = np.ndarray[Any, Any]

MAX_INPUTS = 6000  # second moments of more inputs than this do not fit beside a model


class Repair(Protocol):
    """What compensation asks of a framework: one model before the cut, and the same one after it."""

    @abstractmethod
    def unsuited(self, path: str) -> str | None:
        """Why a layer is left alone, or None."""

    @abstractmethod
    def made_axis(self, path: str) -> int:
        """Which axis of a layer's weight lists its outputs."""

    @abstractmethod
    def values(self, path: str) -> tuple[Array, Array | None]:
        """Weight (n_out, n_in) and bias (n_out,) of a layer after the cut, float64."""

    @abstractmethod
    def calls(self, path: str, batch: Any) -> Iterable[tuple[Array, Array]]:
        """For each call of a layer on a batch: the inputs after the cut (n, n_in), the outputs before it (n, all)."""

    @abstractmethod
    def write(self, path: str, weight: Array, bias: Array | None) -> None:
        """Put weight and bias into the cut model's layer, in place."""


def repair(
    models: Repair, layers: Sequence[str], plan: PrunePlan, data: Iterable[Any], damping: float
) -> dict[str, Any]:
    """Refit the layers of a cut model to the outputs of their originals, in place, one after another as they run.

    A layer is fitted on what the layers before it now hand over. Norms keep their statistics: refitted layers make
    what their originals made, so that the statistics go on being those of the inputs.

    Args:
        models: the model before and after the cut.
        layers: paths in the order they run.
        plan: the cut.
        data: calibration batches.
        damping: see `refit`.

    Returns:
        {"refitted": layer -> rows of calibration data it saw, "left": layers that were left alone -> why}.
    """
    report: dict[str, Any] = {"refitted": {}, "left": {}}
    for path in progress(layers, "layers"):
        why = models.unsuited(path)
        if why is None:
            weight, bias = models.values(path)
            if weight.shape[1] > MAX_INPUTS:
                why = f"more than {MAX_INPUTS} inputs"
        if why is not None:
            report["left"][path] = why
            continue
        kept = plan.indices.get(f"{path}.weight", [None, None])[models.made_axis(path)]
        moments = RefitMoments(weight.shape[1], weight.shape[0], bias is not None)
        for batch in data:
            for given, wanted in models.calls(path, batch):
                moments.add(given, wanted if kept is None else wanted[:, kept])
        models.write(path, *refit(moments, weight, bias, damping))
        report["refitted"][path] = moments.number
    return report


class RefitMoments:
    """Sums of products of a layer's inputs after the cut with themselves and with the outputs wanted.

    Args:
        n_in: number of inputs after the cut, without the constant one.
        n_out: number of outputs.
        bias: whether a constant input stands for the bias.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        self.bias = bias
        self.inputs = np.zeros((n_in + bias, n_in + bias))
        self.outputs = np.zeros((n_out, n_in + bias))
        self.number = 0

    def add(self, x: Array, y: Array) -> None:
        """Add rows of inputs (n, n_in) and of wanted outputs (n, n_out)."""
        x = np.asarray(x, dtype=np.float64)
        if self.bias:
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        self.inputs += x.T @ x
        self.outputs += np.asarray(y, dtype=np.float64).T @ x
        self.number += len(x)


def refit(moments: RefitMoments, weight: Array, bias: Array | None, damping: float) -> tuple[Array, Array | None]:
    """The weights nearest to the cut ones whose outputs are nearest to the wanted ones (ridge regression).

    Minimises |Y - W X|^2 + damping * mean diagonal * |W - weight|^2, the objective of FLAP's bias and SlimGPT's weight
    compensation (An et al. 2024, sec. 3.3; Ling et al. 2024, sec. 3.2) with the cut network's own inputs as X.

    Args:
        moments: sums over the calibration data.
        weight: (n_out, n_in) after the cut.
        bias: (n_out,) or None.
        damping: strength of the pull towards the cut weights, relative to the inputs' mean square.

    Returns:
        (weight, bias).

    Example:
        >>> m = RefitMoments(1, 1, bias=False); m.add(np.array([[1.0], [2.0]]), np.array([[3.0], [6.0]]))
        >>> refit(m, np.array([[0.0]]), None, 1e-9)[0].round(6).tolist()
        [[3.0]]
    """
    start = np.asarray(weight, dtype=np.float64)
    if moments.bias:
        start = np.concatenate([start, np.asarray(bias, dtype=np.float64)[:, None]], axis=1)
    gram = moments.inputs.copy()
    ridge = damping * max(float(np.trace(gram)) / len(gram), 1e-300)
    gram[np.diag_indices_from(gram)] += ridge
    wrong = moments.outputs - start @ moments.inputs  # (n_out, n_in) what the cut weights leave unexplained
    found = start + np.linalg.solve(gram, wrong.T).T
    if moments.bias:
        return found[:, :-1], found[:, -1]
    return found, None
