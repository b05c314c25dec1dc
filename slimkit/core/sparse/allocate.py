"""A ratio for each layer: the same total, spread by what each layer was measured to cost.

With ratios r_l of layers of n_l weights, together R of all n weights, and costs c_l(r), the relative change of the
block's output when that one layer loses its least weights by magnitude times input norm (wanda):

    minimise sum c_l(r_l)  subject to  sum n_l r_l = R n,  |r_l - R| <= REACH

Costs grow about exponentially, c_l(r) = a_l exp(b_l (r - R)), with b_l and a_l from a line through the logarithms of
the measured points. At the optimum every layer loses as much by one weight more: b_l c_l(r_l) / n_l is one price, so
r_l = R + log(price n_l / (a_l b_l)) / b_l within its bounds, and the price that meets the total is found by bisection.
One walk over the dense model with few batches measures them; no block but a layer's own runs for it. Whether the result
is better than equal ratios is then measured by the outputs of the whole model, masked either way, on batches that
chose nothing. Source: the method of Lagrange; sensitivities one layer at a time, as Frantar & Alistarh 2022 (OBC) take
them. The rule "dlp" (Chen et al. 2025) masks nothing: of each block it reads the median of magnitudes times input
norms, and the block whose median is largest loses most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, isfinite, log, prod
from typing import Any

import numpy as np

from slimkit.core.log import logger, progress
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import CalibratedBlock, PassedBlock, SparseFramework
from slimkit.core.sparse.maths.backend import Array, like, namespace, to_numpy
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import SPOILT, SpoiltError
from slimkit.core.sparse.maths.pattern import keep_across_rows, keep_all_but
from slimkit.core.sparse.processes import in_order
from slimkit.core.sparse.totals import counts

# One of so many batches measures what layers cost, and one judges: a block runs twice for each of its layers.
SHARE = 8

# More batches than this, in all processes together, say little more of so few numbers.
PROBE_BATCHES = 4

# Ratios stay this close to the uniform one: sensitivities are measured there, and far from it they say little.
REACH = 0.2

# How far "dlp" goes from the uniform ratio (its authors' own figure), and how many scores of a block it looks at.
MEDIAN_REACH, MEDIAN_SCORES = 0.15, 2**22

# Of the mean power of a batch's rows: what rows of no power count with.
FLOOR = 1e-4


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


def measured(
    host: SparseFramework, config: SparseConfig, dataset: Any, layers: Mapping[str, SparseLayer], names: Sequence[str]
) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """A ratio for each layer, or None where equal ones are better; the model is left as it was.

    Args:
        host: the model.
        config: what to do.
        dataset: a re-iterable of batches.
        layers: the layers by name.
        names: those that are to change.

    Returns:
        layer -> ratio, together the ratio asked for; and facts for the report.

    Raises:
        SpoiltError: the inputs of a layer are not finite.
    """
    ratios, facts = host.kept("ratios", lambda: list(_measured(host, config, dataset, layers, names)))
    rule = str(config.allocation)
    if facts["kept"] == rule:
        return dict(ratios), facts
    text = "%s ratios change the outputs of masked layers by %.4g, equal ones by %.4g: kept equal ratios."
    logger.warning(text, rule, facts[f"{rule}_error"], facts["uniform_error"])
    return None, facts


def _measured(
    host: SparseFramework, config: SparseConfig, dataset: Any, layers: Mapping[str, SparseLayer], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """A ratio for each layer, and facts for the report: whether they are better than equal ones."""
    probes, others = _apart(host, dataset)
    rule = config.allocation
    choose = _by_medians if rule == "dlp" else _walked
    ratios, norms = choose(host, config, probes, layers, names)
    equal = dict.fromkeys(names, config.sparse_ratio)
    equal_error, error = _errors(host, others or probes, layers, (equal, ratios), norms)
    judges = len(others or probes)
    facts = {
        "kept": rule if error < equal_error else "uniform",
        "uniform_error": equal_error,
        f"{rule}_error": error,
        "probe_batches": judges if host.deals else sum(host.gather(judges)),
        "held_out": bool(others),
    }
    return ratios, facts


def _apart(host: SparseFramework, dataset: Any) -> tuple[list[Any], list[Any]]:
    """Batches to choose ratios with, and others to judge the choice by; no others where a process has but one."""
    data = list(dataset)
    n = max(1, min(len(data) // SHARE, PROBE_BATCHES // (1 if host.deals else host.processes())))
    step = len(data) // n
    alone = not all(host.gather(step > 1))  # all processes alike
    return data[::step][:n], [] if alone else data[step // 2 :: step][:n]


def _errors(
    host: SparseFramework,
    probes: Sequence[Any],
    layers: Mapping[str, SparseLayer],
    choices: Sequence[Mapping[str, float]],
    norms: Mapping[str, Array],
) -> list[float]:
    """How much all processes' outputs change, relative to those of the model as it is, with each choice of ratios."""

    def masking(ratios: Mapping[str, float]) -> Callable[[Sequence[str]], None]:
        zeros = counts({n: layers[n].size for n in ratios}, ratios)

        def mask(names: Sequence[str]) -> None:
            for name in names:
                _mask(host, layers[name], zeros[name], norms.get(name))

        return mask

    rows = in_order(host, host.changes(probes, list(choices[0]), [masking(ratios) for ratios in choices]))
    power = sum(row[0] for row in rows) or 1.0
    return [float(sum(row[i + 1] for row in rows) / power) ** 0.5 for i in range(len(choices))]


def changes(
    host: SparseFramework,
    probes: Sequence[Any],
    names: Sequence[str],
    variants: Sequence[Callable[[Sequence[str]], None]],
) -> list[list[float]]:
    """For each batch the power of a whole model's output, and what each variant changes of it; it is as it was after.

    Args:
        host: the model.
        probes: this process's batches.
        names: layers.
        variants: each masks some layers, in place.
    """
    dense = [host.outputs(batch) for batch in probes]
    rows = [[float((d * d).sum())] for d in dense]
    for mask in variants:
        back = host.snapshot(names)
        mask(names)
        for row, batch, d in zip(rows, probes, dense):
            row.append(float(((host.outputs(batch) - d) ** 2).sum()))
        back()
    return rows


def pass_variants(
    host: SparseFramework,
    stages: Sequence[PassedBlock],
    names: Sequence[str],
    variants: Sequence[Callable[[Sequence[str]], None]],
) -> None:
    """Pass one block's inputs on through it as it is, and through each variant of it; it is as it was after.

    Args:
        host: the model.
        stages: the block with the inputs of the dense model, then with those of each variant.
        names: its layers.
        variants: each masks some layers, in place.
    """
    for mask, stage in zip((None, *variants), stages):
        back = host.snapshot(names)
        if mask is not None:
            mask(names)
        stage.pass_on()
        back()


def _walked(
    host: SparseFramework, config: SparseConfig, probes: Any, layers: Mapping[str, SparseLayer], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Array]]:
    """Ratios by how much each part's outputs change when one layer alone is masked, and the layers' input norms."""
    around = [max(0.02, config.sparse_ratio - REACH), min(0.98, config.sparse_ratio + REACH)]
    together: dict[str, list[str]] = {}
    costs: dict[str, list[float]] = {}
    norms: dict[str, Array] = {}
    bar = iter(progress(list(names), "sensitivities"))
    for stage in host.probing(probes, names):
        if config.row.needs_data:
            norms |= _norms(host, stage, layers)
        dense = list(stage.outputs())
        for group in _families(stage, layers):
            back = host.snapshot(group)
            together[group[0]], costs[group[0]] = group, []
            for ratio in around:
                for name in group:
                    _mask(host, layers[name], round(ratio * layers[name].size), norms.get(name))
                costs[group[0]].append(_change(host, stage, dense))
                back()
            for _ in group:
                next(bar, None)
        stage.advance()
    next(bar, None)
    sizes = {first: sum(layers[n].size for n in group) for first, group in together.items()}
    found = spread(costs, around, sizes, config.sparse_ratio)
    # What no probe reached takes the ratio asked for.
    return dict.fromkeys(names, config.sparse_ratio) | {n: found[f] for f, g in together.items() for n in g}, norms


def _by_medians(
    host: SparseFramework, config: SparseConfig, probes: Any, layers: Mapping[str, SparseLayer], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Array]]:
    """One ratio for each part, by the median of its weights' magnitudes times input norms; and the norms."""
    medians: list[float] = []
    members: list[list[str]] = []
    norms: dict[str, Array] = {}
    for stage in host.probing(probes, names):
        own = [n for feed in stage.feeds for n in feed]
        norms |= _norms(host, stage, layers)
        if own:
            members.append(own)
            medians.append(_median([_scores(layers[n], host.weight(n), norms.get(n)) for n in own]))
        stage.advance()
    low, high = min(medians, default=0.0), max(medians, default=0.0)
    sizes = [sum(layers[n].size for n in own) for own in members]
    places = [(m - low) / (high - low) if high > low else 0.0 for m in medians]
    middle = sum(p * n for p, n in zip(places, sizes)) / max(1, sum(sizes))
    # Beyond .01 and .99 still room on both sides; what is cut off there would be missing from the total.
    most = max(max(places, default=0.0) - middle, middle, 1e-9)
    room = min(2 * MEDIAN_REACH, min(config.sparse_ratio, 1 - config.sparse_ratio) * 0.98 / most)
    ratios = {n: config.sparse_ratio + (p - middle) * room for p, own in zip(places, members) for n in own}
    return dict.fromkeys(names, config.sparse_ratio) | ratios, norms if config.row.needs_data else {}


def _scores(layer: SparseLayer, weight: Array, norms: Array | None) -> Array:
    """(groups, out, n) magnitudes times input norms; magnitudes alone where no row came."""
    scores = abs(layer.to_matrix(weight))
    if norms is None:
        return scores
    xp = namespace(scores)
    return scores * xp.astype(xp.sqrt(norms), scores.dtype)[:, None, :]  # (groups, 1, n)


def _median(scores: Sequence[Array]) -> float:
    """The median of all entries, of every k-th where there are many."""
    xp = namespace(scores[0])
    step = max(1, sum(prod(s.shape) for s in scores) // MEDIAN_SCORES)
    every = xp.sort(xp.concat([xp.astype(s.reshape(-1)[::step], xp.float32) for s in scores]))
    return float(every[every.shape[0] // 2])


def _families(stage: CalibratedBlock, layers: Mapping[str, SparseLayer]) -> list[list[str]]:
    """The layers that are measured at once: those of a family, such as a hundred experts' first ones, together."""
    found: dict[str, list[str]] = {}
    for name in (n for feed in stage.feeds for n in feed):
        found.setdefault(layers[name].family or name, []).append(name)
    return list(found.values())


def _norms(host: SparseFramework, stage: CalibratedBlock, layers: Mapping[str, SparseLayer]) -> dict[str, Array]:
    """Layer -> (groups, n_in) sums of its inputs' squares over all processes; none where there were no rows."""
    own: list[dict[str, Any]] = []  # for each batch of this process
    sums: dict[str, Array] = {}

    def add(name: str, x: Array, *_: Any) -> None:
        xp = namespace(x)
        for rows in layers[name].rows(x):  # (groups, rows, n_in)
            rows = xp.astype(rows, xp.float32, copy=False)
            square = xp.sum(rows * rows, axis=1)
            sums[name] = sums[name] + square if name in sums else square

    def ended() -> None:
        own.append({name: to_numpy(total).tolist() for name, total in sums.items()})
        sums.clear()

    names = [feed[0] for feed in stage.feeds]
    if names:
        stage.replay(names, add, ended)
    every = in_order(host, own)
    found: dict[str, Array] = {}
    for feed in stage.feeds:
        shape = (layers[feed[0]].groups, layers[feed[0]].n_in)
        total = np.zeros(shape, np.float32)
        for batch in every:
            total += np.asarray(batch.get(feed[0], 0.0), np.float32)
        if not np.isfinite(total).all():
            raise SpoiltError(f"{SPOILT} at the input of {feed[0]!r}")
        if total.any():
            found |= dict.fromkeys(feed, like(total, host.weight(feed[0])))
    return found


def _mask(host: SparseFramework, layer: SparseLayer, n_zeros: int, norms: Array | None) -> None:
    """Put zeros where weights times input norms are least, alike in each row, or in the whole layer without norms."""
    weight = host.weight(layer.name)
    matrix = layer.to_matrix(weight)  # (groups, out, n)
    xp, scores = namespace(matrix), _scores(layer, weight, norms)
    if norms is None:
        keep = keep_all_but(scores.reshape(-1), n_zeros).reshape(matrix.shape)
    else:
        rows = scores.reshape(-1, scores.shape[2])  # (groups * out, n)
        keep = keep_across_rows(rows, n_zeros).reshape(matrix.shape)
    host.store(layer.name, layer.from_matrix(matrix * xp.astype(keep, matrix.dtype)), None)


def _change(host: SparseFramework, stage: CalibratedBlock, dense: Sequence[Array]) -> float:
    """The mean relative squared change of a token's (or image's) output, over all processes."""
    own: list[list[float]] = []
    for now, before in zip(stage.outputs(), dense, strict=True):
        xp = namespace(before)
        shape = (before.shape[0], -1) if before.ndim > 3 else (-1, before.shape[-1])
        now, before = now.reshape(shape), before.reshape(shape)
        power = xp.sum(before * before, axis=1)
        power = power + FLOOR * xp.mean(power) + 1e-30
        own.append([float(xp.sum(xp.sum((now - before) ** 2, axis=1) / power)), before.shape[0]])
    pairs = in_order(host, own)
    change = sum(t for t, _ in pairs) / max(1, sum(n for _, n in pairs))
    return change if isfinite(change) else 1e30  # too large for the model's dtype
