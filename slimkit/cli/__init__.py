"""The command line: `slimkit COMMAND ...`; each command lives in a file of its own and loads what it needs when run."""

from __future__ import annotations

from typing import Annotated

import typer

from slimkit.cli import (
    adapt,
    check,
    convert,
    distill,
    exits,
    export,
    inspect,
    migrate,
    prune,
    report,
    run,
    schema,
    sparsify,
)

app = typer.Typer(
    name="slimkit",
    help="Make trained models smaller and cheaper to adapt.",
    epilog="Exit codes: " + "; ".join(f"{code} {what}" for code, what in exits.EXITS.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    run.run,
    report.report,
    prune.prune,
    sparsify.sparsify,
    distill.distill,
    adapt.adapt,
    convert.convert,
    export.export,
    check.check,
    inspect.inspect,
    migrate.migrate,
    schema.schema,
):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Make trained models smaller and cheaper to adapt."""
    if version:
        from slimkit import __version__

        typer.echo(f"slimkit {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point of the `slimkit` command; the exit codes are those of `slimkit.cli.exits`."""
    exits.exiting(app)
