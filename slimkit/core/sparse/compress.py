"""Make a model sparse: choose the layers, walk over them with equal or measured ratios, and give account."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slimkit.core import batch as batches
from slimkit.core import check
from slimkit.core.errors import ArgumentError
from slimkit.core.log import logger
from slimkit.core.showing import Report, Shown
from slimkit.core.sparse.allocate import measured
from slimkit.core.sparse.config import SparseConfig
from slimkit.core.sparse.framework import SparseFramework
from slimkit.core.sparse.maths.backend import Array, all_finite
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.maths.moments import SpoiltError
from slimkit.core.sparse.remaining import Progress
from slimkit.core.sparse.select import said, select
from slimkit.core.sparse.sequential import SequentialPass


def compress(
    host: SparseFramework,
    config: SparseConfig,
    dataset: Any,
    on_progress: Callable[[Progress], None] | None = None,
    on_layer: Callable[[Progress, dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Make a model sparse, in place; on any error it is as it was.

    Args:
        host: the model.
        config: what to do.
        dataset: a re-iterable of batches; None for a method that needs no data.
        on_progress: called after every layer; None shows a bar on a terminal and log lines elsewhere.
        on_layer: called after every layer besides, with its row of the report.

    Returns:
        The report (plain JSON values) and the masks (layer -> boolean array, True where the weight stays).
    """
    began = time.perf_counter()
    if config.needs_data:
        dataset = batches.Steady(batches.dataset(dataset))
    layers, skipped = host.layers(dataset if config.needs_data else None)
    names, unmatched = select(layers, skipped, config)
    if config.weight_bits == 8:
        demand_whole_numbers(name for name in names if str(host.weight(name).dtype).endswith("bfloat16"))
    _demand_finite(host, names)
    restore = host.snapshot(names)
    try:
        ratios, allocation = (
            (None, None) if config.allocation is None else measured(host, config, dataset, layers, names)
        )
        walk = SequentialPass(host, config, layers, names, ratios, on_progress, on_layer)
        walk.run(dataset)
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


def demand_whole_numbers(bfloats: Iterable[str]) -> None:
    """Refuse 8 bits for what is stored in bfloat16: its 8 digits cannot tell 127 whole numbers and their step apart.

    Args:
        bfloats: what is stored so.
    """
    name = next(iter(bfloats), None)
    if name is not None:
        raise ArgumentError(
            f"SparseConfig.weight_bits=8 needs float16 or float32 weights. {name!r} is bfloat16, which cannot hold "
            "every whole number up to 127 times a step: convert the model first"
        )


def _demand_finite(host: SparseFramework, names: Sequence[str]) -> None:
    """Refuse weights that are NaN or infinite before a batch meets them; where blocks come one by one, each does."""
    for name in names if host.keeps_masks else ():
        if not all_finite(host.weight(name)):
            raise ArgumentError(f"the weight of {name!r} must be finite. Received: NaN or infinity")


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


class BaseCompressor(Shown):
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

    def _rows(self) -> Iterable[tuple[str, Any]]:
        yield "model", type(self._model).__name__
        yield "method", self._config.method
        yield "pattern", self._config.pattern or f"{self._config.sparse_ratio:g} of each layer"
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        weights = sum(math.prod(mask.shape) for mask in self.masks.values())
        yield "done", f"{len(self.masks)} layers, {1 - kept / weights:.1%} zeros" if weights else "not yet"

    def _ask(self, model: Any) -> SparseFramework:
        raise NotImplementedError

    def compress(self, dataset: Any = None, *, on_progress: Callable[[Progress], None] | None = None) -> Report:
        """Make the model sparse, in place.

        Args:
            dataset: a list (or any re-iterable) of batches: a tensor, a tuple or list of arguments, or a dict of
                keyword arguments. "magnitude" needs none.
            on_progress: called after every layer with a `Progress` (layer, done, total, seconds, seconds_left); None
                shows a bar on a terminal and log lines elsewhere.

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
        return Report("sparsity", report)
