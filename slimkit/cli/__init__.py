"""The command line: `slimkit COMMAND ...`; each command lives in a file of its own, loaded when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from slimkit.cli import exits

_COMMANDS = (
    "run", "report", "prune", "sparsify", "distill", "adapt", "compress", "train",
    "compare", "convert", "export", "check", "inspect", "status",
    "migrate", "schema",
)  # fmt: skip


class _Command(typer.core.TyperCommand):
    """A command that knows where a word belongs which stands alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; a model without its flag is told the flag."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # UsageError of typer's own click, or of click where typer brings none
            extra = "unexpected extra argument" in str(getattr(error, "message", ""))
            if extra and any("--model" in option.opts for option in self.params):
                error.message += ". A model is given by --model, data and the like by flags of their own"  # type: ignore[attr-defined]
            raise


class _Commands(dict[str, Any]):
    """The commands by name, each made when it is first looked at: its options may be those of a job."""

    def __missing__(self, name: str) -> Any:
        if name not in _COMMANDS:
            raise KeyError(name)
        function = getattr(importlib.import_module(f"slimkit.cli.{name}"), name)
        alone = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
        alone.command(name, cls=_Command)(function)
        self[name] = typer.main.get_command(alone)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in _COMMANDS else default

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)

    def keys(self) -> Any:
        return dict.fromkeys(_COMMANDS).keys()

    def items(self) -> Any:
        return [(name, self[name]) for name in _COMMANDS]

    def values(self) -> Any:
        return [self[name] for name in _COMMANDS]


class _Group(typer.core.TyperGroup):
    """The group that holds the commands."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands: dict[str, Any] = _Commands()


app = typer.Typer(
    name="slimkit",
    cls=_Group,
    help="Make trained models smaller and cheaper to adapt.",
    epilog="Exit codes: " + "; ".join(f"{code} {what}" for code, what in exits.EXITS.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="FILE|MODULE",
            help="Python to load first, before the command: it may register methods and rules of your own.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make trained models smaller and cheaper to adapt."""
    if version:
        from slimkit import __version__

        typer.echo(f"slimkit {__version__}")
        raise typer.Exit()
    for place in imports or ():
        from pathlib import Path

        from slimkit.core.jobs import factory

        factory.load(place, Path.cwd(), "--import")


def main() -> None:
    """Entry point of the `slimkit` command; the exit codes are those of `slimkit.cli.exits`."""
    exits.exiting(app)
