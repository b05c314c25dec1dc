"""The report's pictures: inline SVG drawn by matplotlib, the same bytes for the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimkit.core.jobs.measurement import FIGURES, before_and_after, figures
from slimkit.core.page import BLUE, GREEN, GREY, OCHRE, PALE, RED, SKY, VIOLET, picture

# Rows of a picture; the table of layers has them all.
MAX_LAYERS = 60
PICTURES = ("shares", "metrics", "widths", "sparsity", "errors", "curves")
# Letters of a layer's name that a phone's picture has room for.
_NARROW_NAME = 20


def all_plots(report: Mapping[str, Any]) -> dict[str, str]:
    """The report's pictures: name -> SVG text, empty where there are no numbers to draw."""
    stages = report["stages"]
    dense, final = stages[report["dense"]], stages[-1]
    return {
        "shares": shares(stages, report["dense"]),
        "metrics": metrics(stages),
        "widths": widths(dense, final),
        "sparsity": sparsity(final),
        "errors": errors(stages),
        "curves": curves(stages),
    }


def output_errors(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Layer -> its output error, as the last stage that measured it says, in the layers' order."""
    found = {}
    for stage in stages:
        for name, row in (stage["facts"].get("report") or {}).get("layers", {}).items():
            if "output_error" in row:
                found[name] = float(row["output_error"])
    return found


def _legend(axes: Any, narrow: bool) -> None:
    axes.legend(frameon=False, ncols=2 if narrow else 4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)


def _stage_ticks(axes: Any, stages: Sequence[Mapping[str, Any]], narrow: bool) -> None:
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if narrow else {"rotation": 20, "ha": "right"}
    axes.set_xticks(range(len(stages)), [s["name"] for s in stages], **turned)


def shares(stages: Sequence[Mapping[str, Any]], dense_at: int) -> str:
    """Parameters, non-zero parameters, MACs and latency after each stage, as a share of the dense model's."""
    colours = {"parameters": BLUE, "nonzero": SKY, "macs": GREEN, "latency_ms": RED}
    keys = [k for k in colours if figures(stages[dense_at])[k]]
    pairs = [before_and_after(stages[dense_at], s) for s in stages]

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        wide = 0.8 / len(keys)
        for at, key in enumerate(keys):
            values = [after[key] / before[key] for before, after in pairs]
            places = [i - 0.4 + wide * (at + 0.5) for i in range(len(stages))]
            axes.bar(places, values, wide * 0.92, color=colours[key], label=FIGURES[key][0])
        axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
        _stage_ticks(axes, stages, narrow)
        axes.set_ylabel("share of the dense model")
        _legend(axes, narrow)

    return picture(draw, "share of the dense model after each stage", 3.1)


def metrics(stages: Sequence[Mapping[str, Any]]) -> str:
    """Each metric after each stage."""
    names = list(dict.fromkeys(n for s in stages for n in s["metrics"]))
    if not names:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        for name, colour in zip(names, (BLUE, RED, GREEN, VIOLET, OCHRE)):
            points = [(i, s["metrics"][name]) for i, s in enumerate(stages) if name in s["metrics"]]
            axes.plot(*zip(*points), marker="o", color=colour, label=name, linewidth=1.6)
            axes.annotate(f"{points[-1][1]:.4g}", points[-1], xytext=(6, 0), textcoords="offset points", va="center")
        _stage_ticks(axes, stages, narrow)
        axes.margins(x=0.08)
        _legend(axes, narrow)

    return picture(draw, "metrics after each stage", 2.9)


def _rows(figure: Any, names: Sequence[str], narrow: bool) -> tuple[Any, range]:
    """Axes with a row for each layer, the first on top; a phone's has the ends of the names, which tell them apart."""
    axes, rows = figure.subplots(), range(len(names))
    shown = _endings(names, _NARROW_NAME) if narrow else names
    axes.set_yticks(rows, shown, fontsize=8 if narrow else 7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    return axes, rows


def _endings(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many letters: without the path that all share, and then their ends.

    Example:
        >>> _endings(["model.layers.0.q", "model.layers.0.k"], 12), _endings(["a.q", "b.k"], 12)
        (['…q', '…k'], ['a.q', 'b.k'])
    """
    paths = [name.split(".")[:-1] for name in names]
    shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths)))
    cut = sum(len(parts[0]) + 1 for parts in shared) if max(map(len, names), default=0) > most else 0
    left = [name[cut:] for name in names]
    return [f"…{name[1 - most :]}" if len(name) + bool(cut) > most else "…" * bool(cut) + name for name in left]


def _height(count: int) -> tuple[float, float]:
    """Inches of a picture with so many rows, and of the narrow one."""
    return max(1.6, 0.5 + 0.17 * count), max(1.6, 0.6 + 0.16 * count)


def widths(dense: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    """Output width of each layer, dense and final."""
    before = {la["name"]: la["width"] for la in dense["measurement"]["layers"]}
    after = {la["name"]: la["width"] for la in final["measurement"]["layers"]}
    names = list(dict.fromkeys([*before, *after]))[:MAX_LAYERS]
    if not names or before == after:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        axes, rows = _rows(figure, names, narrow)
        axes.barh(rows, [before.get(n, 0) for n in names], 0.78, color=PALE, label="dense")
        axes.barh(rows, [after.get(n, 0) for n in names], 0.44, color=BLUE, label="final")
        axes.set_xlabel("output width")
        _legend(axes, narrow)

    return picture(draw, "width of each layer before and after", *_height(len(names)))


def _bars(values: Mapping[str, float], colour: str, said: str, label: str, limit: float | None = None) -> str:
    """One bar for each layer."""
    drawn = dict(list(values.items())[:MAX_LAYERS])

    def draw(figure: Any, narrow: bool) -> None:
        axes, rows = _rows(figure, list(drawn), narrow)
        axes.barh(rows, list(drawn.values()), 0.7, color=colour)
        axes.set_xlim(0, limit)
        axes.set_xlabel(said)

    return picture(draw, label, *_height(len(drawn)))


def sparsity(final: Mapping[str, Any]) -> str:
    """Share of zeros in each layer's weight."""
    values = {la["name"]: la["sparsity"] for la in final["measurement"]["layers"] if la["shape"]}
    if not any(value > 0.01 for value in values.values()):
        return ""
    return _bars(values, GREEN, "share of zero weights", "sparsity of each layer", 1)


def errors(stages: Sequence[Mapping[str, Any]]) -> str:
    """Output error of each layer that a stage measured."""
    values = output_errors(stages)
    return _bars(values, RED, "share of the output's own size", "output error of each layer") if values else ""


def drawn_of(layers: Iterable[Any]) -> str:
    """What a picture of so many layers leaves out, for its caption; empty where it shows all.

    Example:
        >>> drawn_of(range(3)), drawn_of(range(70))
        ('', '; the first 60 of 70, the table has all')
    """
    count = len(list(layers))
    return f"; the first {MAX_LAYERS} of {count}, the table has all" if count > MAX_LAYERS else ""


def curves(stages: Sequence[Mapping[str, Any]]) -> str:
    """The loss over each stage that trained."""
    trained = [s for s in stages if s["curves"].get("loss")]
    if not trained:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        shape = (len(trained), 1) if narrow else (1, len(trained))
        grid = figure.subplots(*shape, squeeze=False).flatten()
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

    return picture(draw, "training loss of each stage", 2.2, 1.9 * len(trained))
