"""The report's pictures: inline SVG drawn by matplotlib, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkit.core.jobs.measurement import FIGURES, figures
from slimkit.core.page import BLUE, GREEN, GREY, RED, svg

MAX_LAYERS = 60


def all_plots(report: Mapping[str, Any]) -> dict[str, str]:
    """The report's pictures: name -> SVG text, empty where there are no numbers to draw."""
    stages = report["stages"]
    dense, final = stages[report["dense"]], stages[-1]
    return {
        "shares": shares(stages, report["dense"]),
        "metrics": metrics(stages),
        "widths": widths(dense, final),
        "sparsity": sparsity(final),
        "curves": curves(stages),
    }


def shares(stages: Sequence[Mapping[str, Any]], dense_at: int) -> str:
    """Parameters, non-zero parameters, MACs and latency after each stage, as a share of the dense model's."""
    base = figures(stages[dense_at])
    keys = [k for k in ("parameters", "nonzero", "macs", "latency_ms") if base[k]]
    colours = dict(zip(("parameters", "nonzero", "macs", "latency_ms"), (BLUE, "#8db4f5", GREEN, RED)))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        wide = 0.8 / len(keys)
        for at, key in enumerate(keys):
            values = [figures(s)[key] / base[key] for s in stages]
            places = [i - 0.4 + wide * (at + 0.5) for i in range(len(stages))]
            axes.bar(places, values, wide * 0.92, color=colours[key], label=FIGURES[key][0])
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(stages)), [s["name"] for s in stages], rotation=20, ha="right")
        axes.set_ylabel("share of the dense model")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)

    return svg(8.4, 3.1, draw, "share of the dense model after each stage")


def metrics(stages: Sequence[Mapping[str, Any]]) -> str:
    """Each metric after each stage."""
    names = list(dict.fromkeys(n for s in stages for n in s["metrics"]))
    if not names:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, colour in zip(names, (BLUE, RED, GREEN, "#8a5bd0", "#c58a00")):
            points = [(i, s["metrics"][name]) for i, s in enumerate(stages) if name in s["metrics"]]
            axes.plot(*zip(*points), marker="o", color=colour, label=name, linewidth=1.6)
            axes.annotate(f"{points[-1][1]:.4g}", points[-1], xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_xticks(range(len(stages)), [s["name"] for s in stages], rotation=20, ha="right")
        axes.margins(x=0.08)
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)

    return svg(8.4, 2.9, draw, "metrics after each stage")


def _layer_figure(count: int) -> tuple[float, float]:
    return 8.4, max(1.6, 0.5 + 0.17 * count)


def widths(dense: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    """Output width of each layer, dense and final."""
    before = {la["name"]: la["width"] for la in dense["measurement"]["layers"]}
    after = {la["name"]: la["width"] for la in final["measurement"]["layers"]}
    names = list(dict.fromkeys([*before, *after]))[:MAX_LAYERS]
    if not names or before == after:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        rows = range(len(names))
        axes.barh(rows, [before.get(n, 0) for n in names], 0.78, color="#dfe4ec", label="dense")
        axes.barh(rows, [after.get(n, 0) for n in names], 0.44, color=BLUE, label="final")
        axes.set_yticks(rows, names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("output width")
        axes.legend(frameon=False, ncols=2, loc="lower right", fontsize=8)

    return svg(*_layer_figure(len(names)), draw, "width of each layer before and after")


def sparsity(final: Mapping[str, Any]) -> str:
    """Share of zeros in each layer's weight."""
    layers = [la for la in final["measurement"]["layers"] if la["shape"]][:MAX_LAYERS]
    if not any(la["sparsity"] > 0.01 for la in layers):
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        rows = range(len(layers))
        axes.barh(rows, [la["sparsity"] for la in layers], 0.7, color=GREEN)
        axes.set_yticks(rows, [la["name"] for la in layers], fontsize=7)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of zero weights")

    return svg(*_layer_figure(len(layers)), draw, "sparsity of each layer")


def curves(stages: Sequence[Mapping[str, Any]]) -> str:
    """The loss over each stage that trained."""
    trained = [s for s in stages if s["curves"].get("loss")]
    if not trained:
        return ""

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(trained), squeeze=False)[0]
        for axes, stage in zip(grid, trained):
            # One point says nothing: a stage of few epochs shows its steps.
            by_step = len(stage["curves"]["loss"]) < 4 and stage["curves"].get("loss_by_step")
            values = by_step or stage["curves"]["loss"]
            axes.plot(
                range(1, len(values) + 1), values, color=BLUE, linewidth=1.4, marker="." if len(values) < 30 else ""
            )
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(stage["name"])
            axes.set_xlabel("step" if by_step else "epoch")
        grid[0].set_ylabel("loss")

    return svg(8.4, 2.2, draw, "training loss of each stage")
