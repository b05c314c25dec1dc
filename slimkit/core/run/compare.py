"""Several runs side by side: one table and one page out of their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core import check
from slimkit.core.errors import FileFormatError
from slimkit.core.files import as_path, atomic_file, read_json
from slimkit.core.jobs.measurement import FIGURES, before_and_after, show
from slimkit.core.page import rendered
from slimkit.core.run import plots


def read_report(run: Any) -> dict[str, Any]:
    """The report of a run.

    Args:
        run: a run's folder, or a report.json.

    Raises:
        FileFormatError: there is no report, or it is none of slimkit's.
    """
    path = as_path(run, "run")
    file = path / "report.json" if path.is_dir() else path
    report = read_json(file, "run")
    if not isinstance(report, dict) or report.get("format") != "slimkit-report" or report.get("version") != 1:
        raise FileFormatError(f"{file} is not a slimkit report of version 1")
    if not isinstance(report.get("stages"), list) or not report["stages"]:
        raise FileFormatError(f"{file} holds no stages")
    found: dict[str, Any] = report
    return found


def compare_rows(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What the final models weigh and measure, a row for each figure and metric, a cell for each run.

    Args:
        reports: as `read_report` gives them.

    Returns:
        (figure or metric, a cell for each report); empty where a run does not have it.
    """
    finals = [report["stages"][-1] for report in reports]
    denses = [report["stages"][report["dense"]] for report in reports]
    rows = []
    for key, (label, unit) in FIGURES.items():
        cells = []
        for dense, final in zip(denses, finals):
            before, after = (found[key] for found in before_and_after(dense, final))
            cells.append(show(after, unit) + (f" ({after / before:.3f}x)" if before else ""))
        rows.append((label, cells))
    for name in dict.fromkeys(name for final in finals for name in final["metrics"]):
        cells = []
        for dense, final in zip(denses, finals):
            value, was = final["metrics"].get(name), dense["metrics"].get(name)
            cells.append("" if value is None else f"{value:.4f}" + ("" if was is None else f" ({value - was:+.4f})"))
        rows.append((name, cells))
    rows.append(("Seconds", [f"{sum(stage['seconds'] for stage in report['stages']):.1f}" for report in reports]))
    rows.append(("Framework", [report["recipe"].get("framework", "") for report in reports]))
    rows.append(("Seed", [str(report["seed"]) for report in reports]))
    return rows


def recipe_rows(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The recipe keys in which the runs differ, by path, a cell for each run."""
    flat = [_flat(report["recipe"]) for report in reports]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def write_comparison(runs: Sequence[Any], out: Any) -> Path:
    """Write one self-contained page that shows several runs side by side.

    Args:
        runs: two or more run folders, or their report.json files.
        out: the page; it appears whole or not at all.

    Returns:
        Its path.

    Raises:
        ArgumentError: fewer than two runs.
        FileFormatError: a run without a readable report.

    Example:
        >>> write_comparison(["runs/a", "runs/b"], "compare.html")  # doctest: +SKIP
    """
    if len(runs) < 2:
        check.wrong_value("runs", "two or more runs", list(runs))
    reports = [read_report(run) for run in runs]
    target = as_path(out, "out")
    page = render_comparison(reports, [str(run) for run in runs])
    with atomic_file(target, "w") as handle:
        handle.write(page)
    return target


def render_comparison(reports: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """The page of `write_comparison`.

    Args:
        reports: as `read_report` gives them.
        labels: what to call each.
    """
    return rendered(
        "slimkit.core.run",
        "compare.html.j2",
        labels=labels,
        titles=[report["title"] for report in reports],
        incomplete=[not report["complete"] for report in reports],
        rows=compare_rows(reports),
        differences=recipe_rows(reports),
        stages=[
            [(s["name"], s["facts"].get("headline", ""), s["metrics"]) for s in report["stages"]] for report in reports
        ],
        plots=[plots.all_plots(report) for report in reports],
    )


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Leaves of plain JSON by dotted path."""
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value:
        return {k: v for at, part in enumerate(value) for k, v in _flat(part, f"{path}[{at}]").items()}
    return {path: "" if value is None else str(value)}
