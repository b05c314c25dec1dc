"""The before-and-after account of a run: the page and the JSON that show what each stage did."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from slimkit.core.compare.comparison import Comparison
from slimkit.core.files import atomic_file, write_json
from slimkit.core.jobs.measurement import FIGURES, figures, goals, show, summary_rows
from slimkit.core.page import rendered
from slimkit.core.run import plots

# What a stage `export` writes of the model.
_EXPORTED = ("model.onnx", "model.mindir")


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stages say in one line each, as (stage, sentence); a stage says it under facts["headline"]."""
    return [(s["name"], s["facts"]["headline"]) for s in report["stages"] if s["facts"].get("headline")]


def comparisons(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """What stages that compare found, as (stage, head of the table, rows, protocol)."""
    found = []
    for stage in report["stages"]:
        if stage["facts"].get("comparison"):
            told = Comparison.from_dict(stage["facts"]["comparison"])
            head, *rows = told.rows()
            found.append((stage["name"], head, rows, told.sentence()))
    return found


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


def columns(cards: Sized) -> int:
    """How many cards stand in a row: at most five, as even as the rows can be.

    Example:
        >>> columns(range(5)), columns(range(6)), columns(range(8))
        (5, 3, 4)
    """
    rows = -(-len(cards) // 5)
    return -(-len(cards) // rows)


def render(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page: tables, inline SVG plots, no script, nothing fetched."""
    last, recipe = report["stages"][-1], report["recipe"]
    return rendered(
        "slimkit.core.run",
        "report.html.j2",
        report=report,
        stages=report["stages"],
        dense=report["stages"][report["dense"]],
        rows=summary_rows(report),
        goals=goals(report),
        columns=columns,
        package="slimkit_ms" if recipe["framework"] == "mindspore" else "slimkit",
        trust=not isinstance(recipe["model"], str) or ":" in recipe["model"],
        weights=f"stages/{last['name']}/model.safetensors",
        exported=[f"stages/{s['name']}/{file}" for s in report["stages"] for file in s["files"] if file in _EXPORTED],
        errors=plots.output_errors(report["stages"]),
        left_out=plots.drawn_of(last["measurement"]["layers"]),
        headlines=headline(report),
        # Drawn once, when there is no stage to come: each takes a tenth of a second.
        plots=plots.all_plots(report) if report["complete"] else dict.fromkeys(plots.PICTURES, ""),
        show=show,
        figures=figures,
        FIGURES=FIGURES,
        comparisons=comparisons(report),
    )
