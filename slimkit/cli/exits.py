"""What the command line's exit codes mean, and the one place where an error becomes one."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from slimkit.core.errors import SlimkitError
from slimkit.core.jobs import crew
from slimkit.core.jobs.signals import Terminated, terminating

# The table of docs/cli.md; a test holds the two together.
EXITS = {
    0: "done",
    1: "done, and something was found that a person must look at (`check`, `migrate`, `compare --fail-if`, a ratio "
    "that `prune`, `sparsify` or a stage of `run` did not reach)",
    2: "something given is wrong, missing or cannot be read or written; nothing was half written",
    70: "a bug in slimkit or in a library: the traceback is printed",
    130: "interrupted (Ctrl-C); the message says how to go on",
    143: "terminated (SIGTERM, a scheduler's stop); the message says how to go on",
}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, with the line that says how to go on.

    Args:
        go_on: that line.
        code: the exit code, 130 or 143.
    """

    def __init__(self, go_on: str, code: int = 130) -> None:
        super().__init__(go_on)
        self.code = code


def exiting(command: Callable[[], object]) -> None:
    """Run the command line; every error becomes one line on stderr and an exit code of the table."""
    try:
        with terminating():
            command()
    except SlimkitError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _fail(f"{'interrupted' if stop.code == 130 else 'terminated'}; {stop}", stop.code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except Terminated:
        _fail("terminated; nothing was written", 143)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except Exception as error:  # noqa: BLE001  (the last resort: whatever is left is a bug, and says so)
        if (told := _system(error)) is not None:
            _fail(f"output: {told}", 2)
        traceback.print_exc()
        _fail("this is a bug; please report it with the lines above", 70)


def _system(error: Exception) -> str | None:
    """What the system said, where a library that writes files hides its error in one of its own."""
    if type(error).__name__ != "SafetensorError":
        return None
    found = re.search(r"I/O error: (.+) \(os error \d+\)", str(error))
    return found[1] if found else None


def _fail(message: str, code: int) -> NoReturn:
    if crew.size() == 1 or _speaks():
        print(f"slimkit: {message}", file=sys.stderr)
    sys.exit(code)


def _speaks() -> bool:
    """Whether, of several processes, this one is to say why they end."""
    module = sys.modules.get("slimkit.together")
    return bool(module.speaks()) if module is not None else crew.rank() == 0
