"""The before-and-after account of a run: the page and the JSON that show what each stage did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core.compare.comparison import Comparison
from slimkit.core.files import atomic_file, write_json
from slimkit.core.jobs.measurement import FIGURES, figures, show, summary_rows
from slimkit.core.page import rendered
from slimkit.core.run import plots


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


def render(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page: tables, inline SVG plots, no script, nothing fetched."""
    return rendered(
        "slimkit.core.run",
        "report.html.j2",
        report=report,
        stages=report["stages"],
        dense=report["stages"][report["dense"]],
        rows=summary_rows(report),
        headlines=headline(report),
        plots=plots.all_plots(report),
        show=show,
        figures=figures,
        FIGURES=FIGURES,
        comparisons=comparisons(report),
    )
