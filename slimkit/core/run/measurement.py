"""What a model weighs: the figures a report compares, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
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
        latency_ms: median time of one forward on the example input, in the framework itself, with one thread.
        layers: the layers with weights, in the model's order.
    """

    parameters: int
    trainable: int
    zeros: int
    macs: int
    parameter_bytes: int
    latency_ms: float
    layers: tuple[LayerMeasurement, ...]

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
