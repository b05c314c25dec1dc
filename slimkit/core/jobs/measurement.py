"""What a model weighs: the figures a report compares, and how they are shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer with a weight.

    Args:
        name: its path in the model.
        kind: the class of the layer, for example "Conv2d".
        shape: the weight's shape.
        width: output channels or features.
        parameters: numbers in all its own parameters.
        zeros: how many entries of its weight are exactly zero.
        macs: multiply-accumulates for the example input; None if the forward never reached it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    width: int
    parameters: int
    zeros: int
    macs: int | None

    @property
    def sparsity(self) -> float:
        """Share of the weight that is zero."""
        size = 1
        for n in self.shape:
            size *= n
        return self.zeros / size if size else 0.0


@dataclass(frozen=True)
class Measurement:
    """What a model weighs.

    Args:
        parameters: numbers in all parameters, shared ones once.
        trainable: those that a training step would change.
        zeros: how many entries of layer weights are exactly zero.
        macs: multiply-accumulates of its layers for the example input.
        parameter_bytes: memory of the parameters.
        latency_ms: time of the fastest forward on the example input, in the framework itself; with one thread in
            PyTorch, with MindSpore's own choice of threads there, which a running process cannot change.
        layers: the layers with weights, in the model's order.
        dense_ms: the same of the dense model, taken in turn with this one, so that a busy machine slows both; None
            where there was none to compare with.
    """

    parameters: int
    trainable: int
    zeros: int
    macs: int
    parameter_bytes: int
    latency_ms: float
    layers: tuple[LayerMeasurement, ...]
    dense_ms: float | None = None

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerMeasurement],
        parameters: Iterable[tuple[int, int, bool]],
        zeros: int,
        latency_ms: float,
        dense_ms: float | None = None,
    ) -> Measurement:
        """Add up a model's layers and parameters.

        Args:
            layers: the layers with weights, in the model's order.
            parameters: each parameter once as (number of entries, bytes, whether it trains).
            zeros: exact zeros in the layers' weights, a shared weight counted once.
            latency_ms: time of the fastest forward.
            dense_ms: that of the dense model, taken in turn.
        """
        rows, counts = tuple(layers), list(parameters)
        return cls(
            parameters=sum(n for n, _, _ in counts),
            trainable=sum(n for n, _, trains in counts if trains),
            zeros=zeros,
            macs=sum(row.macs or 0 for row in rows),
            parameter_bytes=sum(size for _, size, _ in counts),
            latency_ms=latency_ms,
            layers=rows,
            dense_ms=dense_ms,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, each layer with its sparsity."""
        plain = asdict(self)
        plain["layers"] = [
            {**asdict(layer), "shape": list(layer.shape), "sparsity": round(layer.sparsity, 6)} for layer in self.layers
        ]
        return plain


# What the summary compares, in this order: key -> (label, how to show it).
FIGURES = {
    "parameters": ("Parameters", "count"),
    "nonzero": ("Non-zero parameters", "count"),
    "macs": ("MACs", "count"),
    "file_bytes": ("Weights on disk", "bytes"),
    "latency_ms": ("Latency, eager", "ms"),
}


def figures(stage: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one stage record that the summary compares.

    Args:
        stage: a record of report.json.

    Returns:
        key of FIGURES -> number; weights on disk are those of the stage's own file, or of the parameters in memory.
    """
    measured = stage["measurement"]
    on_disk = stage.get("files", {}).get("model.safetensors", measured["parameter_bytes"])
    return {
        "parameters": measured["parameters"],
        "nonzero": measured["parameters"] - measured["zeros"],
        "macs": measured["macs"],
        "file_bytes": on_disk,
        "latency_ms": measured["latency_ms"],
    }


# More than this times what was asked for may not stay: widths come in steps, and a plan lands within a few percent.
MISSED = 1.05


def goal(what: str, asked: float, reached: float, missed: bool) -> dict[str, Any]:
    """What a stage was asked for against what it reached, as its facts hold it under "goal"."""
    return {"what": what, "asked": asked, "reached": reached, "missed": missed}


def goals(report: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(Stage, what it was asked for and what it reached) of each stage that was asked for a share."""
    return [(stage["name"], stage["facts"]["goal"]) for stage in report["stages"] if stage["facts"].get("goal")]


def before_and_after(dense: Mapping[str, Any], stage: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of the dense model and of a stage's; the dense latency is the one that was taken in turn with it."""
    before, in_turn = figures(dense), stage["measurement"].get("dense_ms")
    return before if in_turn is None else {**before, "latency_ms": in_turn}, figures(stage)


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Dense against final: (what, dense, final, final / dense), the figures first and then the metrics."""
    stages = report["stages"]
    dense, final = stages[report["dense"]], stages[-1]
    rows = []
    before, after = before_and_after(dense, final)
    for key, (label, unit) in FIGURES.items():
        share = f"{after[key] / before[key]:.3f}x" if before[key] else ""
        rows.append((label, show(before[key], unit), show(after[key], unit), share))
    for name, value in final["metrics"].items():
        if name in dense["metrics"]:
            rows.append(
                (name, f"{dense['metrics'][name]:.4f}", f"{value:.4f}", f"{value - dense['metrics'][name]:+.4f}")
            )
    return rows


def fastest_ms(calls: Sequence[Callable[[], Any]], budget_s: float) -> list[float]:
    """Milliseconds of the fastest of each call's runs, taken in turn, every other round backwards.

    A busy machine stops a process for longer than a small forward takes: means and medians then tell of the neighbours,
    and always hit the same one of two calls where their rhythm meets the scheduler's.

    Args:
        calls: what to time; each returns when its work is done. The first round warms up and does not count.
        budget_s: seconds to spend on all; at least three rounds are made, and at most 200. 0 makes none: NaN.

    Example:
        >>> len(fastest_ms([lambda: None, lambda: None], 0.001))
        2
    """
    if budget_s == 0:
        return [math.nan] * len(calls)
    rounds: list[list[float]] = []
    end = time.perf_counter() + budget_s
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < 200):
        rounds.append([0.0] * len(calls))
        for at in range(len(calls))[:: 1 if len(rounds) % 2 else -1]:
            began = time.perf_counter()
            calls[at]()
            rounds[-1][at] = time.perf_counter() - began
    return [round(1000 * min(times), 4) for times in zip(*rounds[1:])]


def show(value: float, unit: str) -> str:
    """A number as people read it.

    Example:
        >>> show(1_234_567, "count"), show(2048, "bytes"), show(1.5, "ms")
        ('1.235 M', '2.0 kB', '1.50 ms')
    """
    if unit == "ms":
        return f"{value:.2f} ms"
    if unit == "bytes":
        for step, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= step:
                return f"{value / step:.1f} {name}"
        return f"{value:.0f} B"
    for step, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= step:
            return f"{value / step:.3f} {name}"
    return f"{value:.0f}" if unit == "count" else f"{value:.4g}"
