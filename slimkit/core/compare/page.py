"""A comparison as a page: what each model lost, with intervals, and what it costs."""

from __future__ import annotations

from typing import Any

from slimkit.core.compare.figures import FIGURES
from slimkit.core.page import BLUE, GREY, RED, picture, rendered

# What is drawn of each task: the first against the size, those with intervals with their intervals.
DRAWN = {
    "language": ("perplexity", "kl", "agreement"),
    "encoder": ("cosine",),
    "classifier": ("accuracy", "agreement"),
}


def render_page(found: Any, title: str = "What the smaller models lost") -> str:
    """A comparison as one self-contained HTML page.

    Args:
        found: the comparison.
        title: its heading.
    """
    head, *rows = found.rows()
    main = DRAWN[found.task][0]
    return rendered(
        "slimkit.core.compare",
        "comparison.html.j2",
        title=title,
        sentence=found.sentence(),
        head=head,
        rows=rows,
        main=FIGURES[main].label,
        data=[(key, value) for key, value in found.data.items()],
        plots={"differences": _differences(found), "sizes": _sizes(found, main)},
    )


def _differences(found: Any) -> str:
    small = found.results[1:]
    names = [n for n in DRAWN[found.task] if any(n in r.intervals for r in small)]
    if not names:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        shape = (len(names), 1) if narrow else (1, len(names))
        grid = figure.subplots(*shape, squeeze=False, sharey=True).flatten()
        for axes, name in zip(grid, names):
            about = FIGURES[name]
            for row, result in enumerate(small):
                if name not in result.intervals:
                    continue
                low, high = result.intervals[name]
                axes.plot([low, high], [row, row], color=BLUE, linewidth=5, solid_capstyle="round", alpha=0.45)
                axes.plot([_drawn(found, result.figures[name], name)], [row], marker="o", color=BLUE, markersize=5)
            if about.difference != "own":
                axes.axvline(1.0 if about.difference == "ratio" else 0.0, color=GREY, linestyle="--", linewidth=1)
            unit = {"ratio": ", times the dense model's", "gap": ", difference to dense", "own": ""}
            axes.set_title(about.label + unit[about.difference])
            axes.set_yticks(range(len(small)), [r.name for r in small])
            axes.set_ylim(len(small) - 0.5, -0.5)

    height = max(1.4, 0.7 + 0.32 * len(small))
    return picture(draw, "what each model lost", height, height * len(names))


def _drawn(found: Any, value: float | None, name: str) -> float:
    base = found.dense.figures.get(name)
    if value is None or FIGURES[name].difference == "own" or base is None:
        return float("nan") if value is None else value
    return value / base if FIGURES[name].difference == "ratio" else value - base


def _sizes(found: Any, main: str) -> str:
    points = [(r.figures.get("bytes"), r.figures.get(main), r.name) for r in found.results]
    known = [(size / 1e6, value, name) for size, value, name in points if size is not None and value is not None]
    if len(known) < 2:
        return ""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        for size, value, name in known:
            axes.plot([size], [value], marker="o", color=RED if name == found.dense.name else BLUE)
            axes.annotate(name, (size, value), xytext=(6, 3), textcoords="offset points", fontsize=8)
        axes.set_xlabel("MB")
        axes.set_ylabel(FIGURES[main].label)
        axes.margins(x=0.3 if narrow else 0.15, y=0.2)

    return picture(draw, f"{FIGURES[main].label} against size", 2.8)
