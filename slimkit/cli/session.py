"""One command at work: what goes to stdout, what to stderr, how loud, and what Ctrl-C and SIGTERM say."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slimkit.cli.exits import Interrupted
from slimkit.cli.options import Output
from slimkit.core.errors import ConfigError
from slimkit.core.jobs import crew
from slimkit.core.jobs.signals import Terminated
from slimkit.core.log import logger, set_logger_level

_WIDE = 10_000


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
        # What Ctrl-C and SIGTERM tell the user; a command overwrites it once it has left something to go on from.
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
        # In a file or a pipe there is no edge to wrap at; names stay whole for grep.
        Console(file=self._out, highlight=False, width=None if self._out.isatty() else _WIDE).print(table)
        if len(shown) < len(rows):
            self.line(f"... and {len(rows) - len(shown)} more; --all shows them, --json holds them")

    def result(self, value: dict[str, Any], *, dry_run: bool = False) -> None:
        """The result for programs: {"command": ..., "dry_run": ..., **value}."""
        if self.as_json:
            whole = {"command": self.command, "dry_run": dry_run, **value}
            print(json.dumps(_plain(whole), indent=1, ensure_ascii=False, allow_nan=False), file=self._out)


@contextlib.contextmanager
def session(command: str, output: Output) -> Iterator[Session]:
    """A command at work: the logger's level is set, libraries' prints go to stderr, a stop says how to go on."""
    if output.quiet and output.verbose:
        raise ConfigError("--quiet and --verbose cannot both be given")
    before, level = list(logger.handlers), logger.level
    set_logger_level("warning" if output.quiet else "debug" if output.verbose else "info")
    if crew.rank() > 0:  # of several processes one speaks
        logger.setLevel("ERROR")
    made = Session(command, output.as_json, output.quiet)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield made
    except KeyboardInterrupt:
        raise Interrupted(made.go_on) from None
    except Terminated:
        raise Interrupted(made.go_on, 143) from None
    finally:
        # A command called from a program leaves its logging as it was.
        logger.setLevel(level)
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)


def _plain(value: Any) -> Any:
    """What JSON can hold: paths as text, reports as objects, NumPy's numbers as numbers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    for method in ("to_dict", "as_dict", "tolist"):
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    return value
