"""`slimkit report`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options
from slimkit.cli.session import session


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (or their report.json), two or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("compare.html"),
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show several runs side by side: figures, metrics, where the recipes differ, and each stage.

    Example: slimkit report runs/digits runs/digits-3 --out compare.html
    """
    with session("report", options.Output(as_json=as_json, quiet=quiet)) as talk:
        from slimkit.core.jobs import claim
        from slimkit.core.run.compare import compare_rows, read_report, recipe_rows, write_comparison

        with claim.claimed(out, file=True, force=force):
            page = write_comparison(runs, out)
        reports = [read_report(run) for run in runs]
        rows, differ = dict(compare_rows(reports)), dict(recipe_rows(reports))
        talk.table("", ["", *(str(run) for run in runs)], [(name, *cells) for name, cells in rows.items()])
        talk.line(f"Written: {page}")
        talk.result({"page": page, "runs": [str(run) for run in runs], "rows": rows, "recipe": differ})
