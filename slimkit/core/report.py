"""The before-and-after account of a run: what is measured of a model, and the page and JSON that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimkit.core.files import atomic_file, write_json


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
        plain["layers"] = [{**asdict(layer), "sparsity": round(layer.sparsity, 6)} for layer in self.layers]
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


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stages say in one line each, as (stage, sentence); a stage says it under facts["headline"]."""
    return [(s["name"], s["facts"]["headline"]) for s in report["stages"] if s["facts"].get("headline")]


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json and report.html, each atomically.

    Args:
        report: plain JSON, as the runner makes it.
        folder: where they go.

    Returns:
        The path of the page.
    """
    write_json(folder / "report.json", report)
    page = render(report)
    with atomic_file(folder / "report.html", "w") as handle:
        handle.write(page)
    return folder / "report.html"


def render(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page: tables, inline SVG plots, no script, nothing fetched."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from slimkit.core import plots

    template = files("slimkit.core").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(show=show, figures=figures, FIGURES=FIGURES)
    return environment.from_string(template).render(
        report=report,
        stages=report["stages"],
        dense=report["stages"][report["dense"]],
        rows=summary_rows(report),
        headlines=headline(report),
        plots=plots.all_plots(report),
    )
