"""Make a model sparse: choose the layers, walk over them with equal or measured ratios, and give account."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimkit.core import batch as batches
from slimkit.core import check, match
from slimkit.core.errors import ArgumentError, PatternError
from slimkit.core.log import logger, progress
from slimkit.core.sparse.allocate import REACH, spread
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import Array, all_finite
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import SpoiltError
from slimkit.core.sparse.maths.solve import solve
from slimkit.core.sparse.remaining import Progress
from slimkit.core.sparse.sequential import SequentialPass, estimate_of

# Batches whose outputs judge a choice of ratios.
PROBE_BATCHES = 4

# One of so many batches is held out from a choice of ratios, to judge it by; with fewer all are used for both.
HOLD_OUT = 5


def select(
    layers: Mapping[str, SparseLayer], skipped: dict[str, str], config: SparseConfig
) -> tuple[list[str], list[str]]:
    """The layers that a configuration asks for, and its patterns that match none.

    Args:
        layers: every layer that can be sparse.
        skipped: name -> reason; layers that the pattern does not fit are added, in place.
        config: targets, ignore, pattern, strict.

    Returns:
        Names in the model's order, and the unmatched patterns.

    Raises:
        PatternError: a pattern matches no layer, and `config.strict`.
        ArgumentError: nothing is left, or the n:m pattern does not fit a layer and `config.strict`.
    """
    paths = {path: name for name, layer in layers.items() for path in (name, *layer.aliases)}
    known = [*paths, *skipped]
    wanted = match.match(known, config.targets, whole_modules=True) if config.targets is not None else None
    left = match.match(known, config.ignore, whole_modules=True)
    if config.strict:
        if wanted is not None:
            match.demand(wanted, known, "SparseConfig.targets")
        match.demand(left, known, "SparseConfig.ignore")
        refused = [
            f"{n!r} ({skipped[n]})" for n in (wanted.names if wanted else ()) if n in skipped and n not in left.names
        ]
        if refused and not any(n in paths for n in (wanted.names if wanted else ())):
            raise ArgumentError(
                f"SparseConfig.targets must match layers that can be sparse. Received: {', '.join(refused)}"
            )
    chosen = {paths[n] for n in (wanted.names if wanted else paths) if n in paths} - {
        paths[n] for n in left.names if n in paths
    }
    names = [n for n in layers if n in chosen]
    if config.nm is not None:
        unfit = [n for n in names if layers[n].n_channels % config.nm.group]
        if unfit and config.strict:
            raise ArgumentError(
                f"SparseConfig.pattern {config.pattern!r} needs input channels in multiples of {config.nm.group}; "
                f"{', '.join(f'{n!r} has {layers[n].n_channels}' for n in unfit)}. Put them into `ignore`."
            )
        for n in unfit:
            skipped[n] = f"{layers[n].n_channels} input channels are no multiple of {config.nm.group}"
        names = [n for n in names if n not in skipped]
    unmatched = [*(wanted.unmatched if wanted else ()), *left.unmatched]
    if not names:
        raise PatternError(
            f"no layer is left to make sparse: of {len(layers)} that can be, `targets` and `ignore` leave none"
            + ("" if layers else f" ({_why_none(skipped)})")
        )
    return names, unmatched


def _why_none(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return "the model has no Linear, Conv1D or Conv2d"
    reasons = {why: [n for n in skipped if skipped[n] == why] for why in skipped.values()}
    return "; ".join(f"{said(names)} left alone: {why}" for why, names in reasons.items())


def said(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, the first few of many.

    Example:
        >>> said(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more were"
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more + (" were" if len(names) > 1 else " was")


def compress(
    host: SparseFramework, config: SparseConfig, dataset: Any, on_progress: Callable[[Progress], None] | None = None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Make a model sparse, in place; on any error it is as it was.

    Args:
        host: the model.
        config: what to do.
        dataset: a re-iterable of batches; None for a method that needs no data.
        on_progress: called after every layer; None shows a bar on a terminal and log lines elsewhere.

    Returns:
        The report (plain JSON values) and the masks (layer -> boolean array, True where the weight stays).
    """
    began = time.perf_counter()
    if config.needs_data:
        dataset = batches.Steady(batches.dataset(dataset))
    layers, skipped = host.layers(dataset if config.needs_data else None)
    names, unmatched = select(layers, skipped, config)
    restore = host.snapshot(names)
    try:
        _demand_finite(host, names)
        if config.uniform:
            walk, allocation = SequentialPass(host, config, layers, names, None, on_progress), None
            walk.run(dataset)
        else:
            walk, allocation = _better(host, config, dataset, layers, names, restore, on_progress)
    except SpoiltError as error:
        restore()
        spoilt = host.not_finite()
        why = f"; the model itself holds NaN or infinity in {', '.join(map(repr, spoilt[:5]))}" if spoilt else ""
        raise ArgumentError(f"{error}{why}") from None
    except BaseException:
        restore()
        raise
    report = _report(config, layers, names, walk.solved, skipped, unmatched, time.perf_counter() - began)
    return report | ({"allocation": allocation} if allocation else {}), walk.masks


def _demand_finite(host: SparseFramework, names: Sequence[str]) -> None:
    """Refuse weights that are NaN or infinite before a batch meets them; where blocks come one by one, each does."""
    for name in names if host.keeps_masks else ():
        if not all_finite(host.weight(name)):
            raise ArgumentError(f"the weight of {name!r} must be finite. Received: NaN or infinity")


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


def _better(
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


def _report(
    config: SparseConfig,
    layers: Mapping[str, SparseLayer],
    names: Sequence[str],
    solved: Mapping[str, dict[str, Any]],
    skipped: Mapping[str, str],
    unmatched: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    weights, zeros = (sum(solved[n][key] for n in names) for key in ("weights", "zeros"))
    fallbacks = {n: solved[n]["fallback"] for n in names if "fallback" in solved[n]}
    for name, reason in fallbacks.items():
        logger.warning("%s: %s; it was sparsified by magnitude.", name, reason)
    for reason in dict.fromkeys(skipped.values()):
        alike = [n for n, why in skipped.items() if why == reason]
        logger.warning("%s left alone: %s.", said(alike), reason)
    asked = round(config.sparse_ratio * weights)
    if zeros < asked and zeros == weights - len(names):
        logger.warning("%d weights are zero where %d were asked for: one stays in each layer.", zeros, asked)
    return {
        "config": config.to_dict(),
        "layers": {n: solved[n] for n in names},
        "fallbacks": fallbacks,
        "skipped": dict(skipped),
        "ignored": [n for n in layers if n not in set(names) and n not in skipped],
        "unmatched": list(unmatched),
        "weights": weights,
        "zeros": zeros,
        "ratio": zeros / weights,
        "seconds": round(seconds, 3),
    }


class BaseCompressor:
    """Makes a model sparse, in place; each wing says how it asks its models.

    Args:
        model: the model.
        cfg: what to do.

    Attributes:
        compressed_model: the model after `compress`, None before.
        masks: layer name -> boolean array, True where the weight stays; empty before `compress`.
    """

    def __init__(self, model: Any, cfg: SparseConfig) -> None:
        self._host = self._ask(model)
        self._model = model
        self._config = check.instance(cfg, SparseConfig, "cfg")
        self.compressed_model: Any = None
        self.masks: dict[str, Any] = {}

    def _ask(self, model: Any) -> SparseFramework:
        raise NotImplementedError

    def compress(self, dataset: Any = None, *, on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
        """Make the model sparse, in place.

        Args:
            dataset: a list (or any re-iterable) of batches: a tensor, a tuple or list of arguments, or a dict of
                keyword arguments. "magnitude" needs none.
            on_progress: called after every layer with a `Progress` (layer, done, total, seconds, seconds_left), with
                `uniform=False` in each of the two runs over the model; None shows a bar on a terminal and log lines
                elsewhere.

        Returns:
            The report: "layers" (a row each: method, ratio, rows, output_error ...), "fallbacks", "skipped",
            "ignored", "unmatched", "weights", "zeros", "ratio", "seconds" and "config"; plain JSON values.

        Raises:
            ArgumentTypeError: the data set is no list of batches, or can be read only once.
            ArgumentError: it is empty, it gives NaN or infinite inputs, or a pattern does not fit.
            PatternError: a pattern matches no layer.
        """
        report, self.masks = compress(self._host, self._config, dataset, on_progress)
        self.compressed_model = self._model
        return report
