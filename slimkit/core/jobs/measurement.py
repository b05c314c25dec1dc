"""What a model weighs: the figures a report compares, and how they are shown."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
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
        latency_ms: median time of one forward on the example input, in the framework itself; with one thread in
            PyTorch, with MindSpore's own choice of threads there, which a running process cannot change.
        layers: the layers with weights, in the model's order.
    """

    parameters: int
    trainable: int
    zeros: int
    macs: int
    parameter_bytes: int
    latency_ms: float
    layers: tuple[LayerMeasurement, ...]

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerMeasurement],
        parameters: Iterable[tuple[int, int, bool]],
        zeros: int,
        latency_ms: float,
    ) -> Measurement:
        """Add up a model's layers and parameters.

        Args:
            layers: the layers with weights, in the model's order.
            parameters: each parameter once as (number of entries, bytes, whether it trains).
            zeros: exact zeros in the layers' weights, a shared weight counted once.
            latency_ms: median time of one forward.
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


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Dense against final: (what, dense, final, final / dense), the figures first and then the metrics."""
    stages = report["stages"]
    dense, final = stages[report["dense"]], stages[-1]
    rows = []
    before, after = figures(dense), figures(final)
    for key, (label, unit) in FIGURES.items():
        share = f"{after[key] / before[key]:.3f}x" if before[key] else ""
        rows.append((label, show(before[key], unit), show(after[key], unit), share))
    for name, value in final["metrics"].items():
        if name in dense["metrics"]:
            rows.append(
                (name, f"{dense['metrics'][name]:.4f}", f"{value:.4f}", f"{value - dense['metrics'][name]:+.4f}")
            )
    return rows


def median_ms(call: Callable[[], Any], budget_s: float) -> float:
    """Median milliseconds of a call; the first one warms up and does not count.

    Args:
        call: what to time; it returns when the work is done.
        budget_s: seconds to spend; at least three calls are made, and at most 200. 0 makes none: NaN.
    """
    if budget_s == 0:
        return math.nan
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times[1:]), 4)


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
