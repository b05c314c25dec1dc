"""One command at work: what goes to stdout, what to stderr, how loud, and what Ctrl-C says."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimkit.cli.exits import Interrupted
from slimkit.core.errors import ConfigError
from slimkit.core.log import set_logger_level


class Session:
    """Where a command puts its result: people read lines and tables, programs one JSON object.

    Args:
        command: its name, first in the JSON object.
        as_json: print one JSON object on stdout, and nothing else there.
        quiet: no lines for people.
    """

    def __init__(self, command: str, as_json: bool, quiet: bool) -> None:
        self.command, self.as_json, self.quiet = command, as_json, quiet
        self._out = sys.stdout
        # What Ctrl-C tells the user; a command overwrites it once it has left something to go on from.
        self.go_on = "nothing was written"

    def line(self, text: str) -> None:
        """A line for people."""
        if not self.as_json and not self.quiet:
            print(text, file=self._out)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int | None = None
    ) -> None:
        """A table for people; the rows beyond `limit` are counted in a last line."""
        if self.as_json or self.quiet:
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title), title_justify="left")
        for at, column in enumerate(columns):
            table.add_column(column, justify="left" if at == 0 else "right", overflow="fold")
        shown = rows if limit is None else rows[:limit]
        for row in shown:
            table.add_row(*(escape(str(cell)) for cell in row))
        Console(file=self._out, highlight=False).print(table)
        if len(shown) < len(rows):
            self.line(f"... and {len(rows) - len(shown)} more; --all shows them, --json holds them")

    def result(self, value: dict[str, Any], *, dry_run: bool = False) -> None:
        """The result for programs: {"command": ..., "dry_run": ..., **value}."""
        if self.as_json:
            whole = {"command": self.command, "dry_run": dry_run, **value}
            print(json.dumps(whole, indent=1, ensure_ascii=False, default=_plain), file=self._out)


@contextlib.contextmanager
def session(command: str, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> Iterator[Session]:
    """A command at work: the logger's level is set, libraries' prints go to stderr, Ctrl-C says how to go on."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose cannot both be given")
    set_logger_level("warning" if quiet else "debug" if verbose else "info")
    made = Session(command, as_json, quiet)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield made
    except KeyboardInterrupt:
        raise Interrupted(made.go_on) from None


def new_folder(path: Path, option: str = "--out") -> Path:
    """A folder that a command will make: absent or empty, so that nothing of the user's is overwritten.

    Args:
        path: what the user gave.
        option: the option's name, for the message.

    Returns:
        The absolute path.

    Raises:
        ConfigError: something is there already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{option} must be a folder that does not exist yet or is empty. Received: {str(path)!r}")
    return path.absolute()


def _plain(value: Any) -> Any:
    """What json cannot write by itself: paths, NumPy's numbers and arrays, and frozen records."""
    if isinstance(value, Path):
        return str(value)
    for method in ("to_dict", "as_dict", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} has no JSON form")
