"""The command line: `slimkit run recipe.yaml`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slimkit.cli_check import check
from slimkit.core.errors import ConfigError, SlimkitError

app = typer.Typer(
    name="slimkit",
    help="Make trained models smaller and cheaper to adapt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(check)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Make trained models smaller and cheaper to adapt."""
    if version:
        from slimkit import __version__

        typer.echo(f"slimkit {__version__}")
        raise typer.Exit()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/NAME by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. stages.1.prune.reserved_ratio=0.6."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier run in the folder away.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the recipe and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    """Run a recipe: load, prune, distil, sparsify, adapt, export, report.

    A run that was stopped goes on from the last finished stage when the same command is given again.

    Example: slimkit run tools/recipes/digits.yaml --set seed=3 --output runs/digits-3
    """
    from slimkit.core.log import set_logger_level
    from slimkit.core.run.recipe import load_recipe

    set_logger_level("warning" if quiet else "info")
    checked = load_recipe(recipe, _overrides(set_ or []))
    if check:
        typer.echo(f"{recipe}: {len(checked.stages)} stages, nothing wrong")
        return
    folder = output or Path(checked.output or f"runs/{checked.name}")

    from slimkit.core.run.pipeline import run_recipe
    from slimkit.stages import TorchWing

    report = run_recipe(checked, recipe.parent, TorchWing(), folder, restart=restart)
    _show(report, folder, as_json)


def _overrides(pairs: list[str]) -> dict[str, Any]:
    import yaml

    overrides = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise ConfigError(f"--set must be KEY=VALUE. Received: {pair!r}")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: the value is not YAML. Received: {value!r}") from None
    return overrides


def _show(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The summary: dense against final, what the stages say, and where the report is."""
    from slimkit.core.run.report import headline, summary_rows

    rows = summary_rows(report)
    if as_json:
        summary = [dict(zip(("what", "dense", "final", "change"), row)) for row in rows]
        typer.echo(json.dumps({"summary": summary, "report": str(folder / "report.html")}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "dense", "final", "change", title=report["title"], title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, text in headline(report):
        console.print(f"  {name}: {text}", highlight=False)
    console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point; exit codes: 0 done, 2 something given is wrong or cannot be written, 130 interrupted."""
    try:
        app()
    except SlimkitError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last finished stage", 130)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)


def _fail(message: str, code: int) -> None:
    print(f"slimkit: {message}", file=sys.stderr)
    sys.exit(code)
