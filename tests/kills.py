"""A child process that is killed before one of its calls to the system, so that what it left can be looked at."""

from __future__ import annotations

import os
import signal
import sys

MOVES = ("os.rename", "os.remove", "os.rmdir")


def killed_at(turn, work, calls=MOVES):
    """Run `work` in a child that is killed before its `turn`-th opening for writing or other call; whether it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in calls or writes:
                seen += 1
                if seen == turn:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent reads it
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0
