"""`slimkit status`: how far the job in a folder is, who holds it, and what goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli import options
from slimkit.cli.session import session


def status(
    out: Annotated[Path, typer.Argument(help="The folder that the job writes to.", show_default=False)],
    as_json: options.AsJson = False,
) -> None:
    """Tell of a running or stopped job: blocks, rows, time left, who holds the folder, the command that goes on.

    Nothing is changed, and nothing is waited for.

    Example: slimkit status llama-sparse
    """
    with session("status", options.Output(as_json=as_json)) as talk:
        from slimkit.core.jobs import status as jobs

        found = jobs.status(out)
        for line in jobs.lines(found):
            talk.line(line)
        talk.result(found)
