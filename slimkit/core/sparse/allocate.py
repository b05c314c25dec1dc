"""A ratio for each layer: the same total, spread by what each layer was measured to cost.

With ratios r_l of layers of n_l weights, together R of all n weights, and costs c_l(r) measured by dropping one layer's
smallest weights alone:

    minimise sum c_l(r_l)  subject to  sum n_l r_l = R n,  |r_l - R| <= REACH

Costs grow about exponentially, c_l(r) = a_l exp(b_l (r - R)), with b_l and a_l from a line through the logarithms of
the measured points. At the optimum every layer loses as much by one weight more: b_l c_l(r_l) / n_l is one price, so
r_l = R + log(price n_l / (a_l b_l)) / b_l within its bounds, and the price that meets the total is found by bisection.
Whether the result is better than equal ratios is then measured on batches that chose nothing (`better`).
Source: the method of Lagrange; sensitivities one layer at a time, as Frantar & Alistarh 2022 (OBC) take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

from slimkit.core.log import logger, progress
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.solve import solve
from slimkit.core.sparse.remaining import Progress
from slimkit.core.sparse.sequential import SequentialPass, estimate_of

# Batches whose outputs judge a choice of ratios.
PROBE_BATCHES = 4

# One of so many batches is held out from a choice of ratios, to judge it by; with fewer all are used for both.
HOLD_OUT = 5

# Ratios stay this close to the uniform one: sensitivities are measured there, and far from it they say little.
REACH = 0.1


def spread(
    costs: Mapping[str, Sequence[float]], ratios: Sequence[float], sizes: Mapping[str, int], ratio: float
) -> dict[str, float]:
    """Ratios of least summed cost whose weighted mean is the ratio asked for.

    Each layer's cost is taken as a line through its measured points' logarithms, and the one price per weight that
    meets the total is found by bisection.

    Args:
        costs: layer -> its measured cost at each of `ratios`.
        ratios: where the costs were measured, ascending, around `ratio`.
        sizes: layer -> number of weights.
        ratio: the share of all weights to drop.

    Returns:
        layer -> ratio within REACH of the one asked for; together exactly that many weights to within rounding.

    Example:
        >>> found = spread({"a": [1, 2], "b": [1, 8]}, [0.4, 0.6], {"a": 10, "b": 10}, 0.5)
        >>> found["a"] > 0.5 > found["b"] and abs(sum(found.values()) - 1) < 1e-6
        True
    """
    # Beyond .01 and .99 still room on both sides: without it the total could not be met.
    low = max(min(0.01, ratio / 2), ratio - REACH)
    high = min(max(0.99, (1 + ratio) / 2), ratio + REACH)
    slopes, levels = _exponentials(costs, ratios, ratio)

    def at(price: float) -> dict[str, float]:
        # cost(r) = level * exp(slope * (r - ratio)): its derivative per weight equals the price at this r.
        found = {}
        for name, slope in slopes.items():
            best = ratio + log(price * sizes[name] / (levels[name] * slope)) / slope
            found[name] = min(high, max(low, best))
        return found

    total = ratio * sum(sizes.values())
    cheap, costly = 1e-30, 1e30
    for _ in range(200):
        price = (cheap * costly) ** 0.5
        if sum(sizes[n] * r for n, r in at(price).items()) < total:
            cheap = price
        else:
            costly = price
    return at((cheap * costly) ** 0.5)


def _exponentials(
    costs: Mapping[str, Sequence[float]], ratios: Sequence[float], ratio: float
) -> tuple[dict[str, float], dict[str, float]]:
    slopes, levels = {}, {}
    for name, values in costs.items():
        logs = [log(max(v, 1e-20)) for v in values]
        x = [r - ratio for r in ratios]
        mean_x, mean_y = sum(x) / len(x), sum(logs) / len(logs)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, logs)) / sum((a - mean_x) ** 2 for a in x)
        slopes[name] = max(slope, 1e-3)
        levels[name] = exp(mean_y - slope * mean_x)
    return slopes, levels


class _Judge:
    """How much some batches' outputs change, relative to those of the model as it was."""

    def __init__(self, host: SparseFramework, probes: Sequence[Any]) -> None:
        self._host, self._probes = host, probes
        self._dense = [host.outputs(batch) for batch in probes]
        self._power = sum(host.gather(sum(float((d * d).sum()) for d in self._dense))) or 1.0

    def error(self) -> float:
        """The relative change of all processes' outputs."""
        pairs = zip(self._probes, self._dense)
        change = sum(float(((self._host.outputs(batch) - d) ** 2).sum()) for batch, d in pairs)
        return float(sum(self._host.gather(change)) / self._power) ** 0.5


def _apart(host: SparseFramework, dataset: Any) -> tuple[Any, list[Any]]:
    """Batches to choose ratios with, and others to judge the choice by; no others where there are few."""
    data = list(dataset)
    n = min(len(data) // HOLD_OUT, max(1, PROBE_BATCHES // host.processes()))
    n = n if all(host.gather(n)) else 0  # all processes alike
    return data[: len(data) - n], data[len(data) - n :]


def better(
    host: SparseFramework,
    config: SparseConfig,
    dataset: Any,
    layers: Mapping[str, SparseLayer],
    names: Sequence[str],
    restore: Callable[[], None],
    on_progress: Callable[[Progress], None] | None,
) -> tuple[SequentialPass, dict[str, Any]]:
    """The better of equal and measured ratios, by the change of the model's own outputs.

    A method that refits weights follows its calibration data more closely with some ratios than with others, and what
    it gains there says little of other data; so both are judged by batches that neither has seen, where there are
    enough, and the better one is repeated with all of them.
    """
    data, others = _apart(host, dataset)
    probes = data[: max(1, PROBE_BATCHES // host.processes())]
    ratios = _measured(host, config, layers, names, _Judge(host, probes))
    judge = _Judge(host, others or probes)
    estimate = estimate_of(config, layers, names, walks=3 if others else 2)

    def walked(ratios: Mapping[str, float] | None, batches: Any) -> SequentialPass:
        walk = SequentialPass(host, config, layers, names, ratios, on_progress, estimate)
        walk.run(batches)
        return walk

    equal = walked(None, data)
    equal_error, keep_equal = judge.error(), host.snapshot(names)
    restore()
    estimate.again()
    best = walked(ratios, data)
    measured_error = judge.error()
    facts = {
        "kept": "measured" if measured_error < equal_error else "uniform",
        "uniform_error": equal_error,
        "measured_error": measured_error,
        "probe_batches": sum(host.gather(len(others or probes))),
        "held_out": bool(others),
    }
    if facts["kept"] == "uniform":
        logger.warning(
            "measured ratios change the outputs by %.4g, equal ones by %.4g: kept equal ratios.",
            measured_error,
            equal_error,
        )
        keep_equal()
        best = equal
    if others:
        restore()
        estimate.again()
        best = walked(None if best is equal else ratios, [*data, *others])
    return best, facts


def _measured(
    host: SparseFramework, config: SparseConfig, layers: Mapping[str, SparseLayer], names: Sequence[str], judge: _Judge
) -> dict[str, float]:
    """Ratios by how much the model's outputs change when one layer alone loses its smallest weights."""
    around = [max(0.02, config.sparse_ratio - REACH), min(0.98, config.sparse_ratio + REACH)]
    alone = replace(config, method="magnitude", uniform=True, progressive=False, asymmetric=None, residual=False)
    costs: dict[str, list[float]] = {}
    for name in progress(names, "sensitivities"):
        back = host.snapshot([name])
        costs[name] = []
        for ratio in around:
            host.store(name, solve(layers[name], host.weight(name), None, ratio, alone).weight, None)
            costs[name].append(judge.error() ** 2)
            back()
    return spread(costs, around, {n: layers[n].size for n in names}, config.sparse_ratio)
