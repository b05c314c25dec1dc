"""The log of a long job: one JSON object a line, beside its state, for people, schedulers and `slimkit status`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
# Flags that throw a begun job away: what goes on with it is the command without them.
_ANEW = ("--restart",)


class JobLog:
    """Appends events to a job's log.

    Args:
        state: the folder of the job's state, which exists.

    Example:
        >>> import tempfile
        >>> state = Path(tempfile.mkdtemp())
        >>> JobLog(state).note("layer", layer="blocks.0.up", done=1, total=4)
        >>> read_log(state)[0]["layer"]
        'blocks.0.up'
    """

    def __init__(self, state: Path) -> None:
        self._file = state / LOG

    def begun(self, job: str, **facts: Any) -> None:
        """A process has begun the job, or goes on with it."""
        who = {"pid": os.getpid(), "host": socket.gethostname(), "folder": os.getcwd(), "command": own_command()}
        self.note("begun", job=job, **who, **facts)

    def stopped(self, error: BaseException) -> None:
        """An error, Ctrl-C or a signal has stopped the job; a full disk does not hide it."""
        with contextlib.suppress(OSError):
            self.note("stopped", why=" ".join(f"{type(error).__name__} {error}".split())[:300])

    def note(self, event: str, **facts: Any) -> None:
        """Append an event; what it says must be plain JSON values."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, ensure_ascii=False)
        with open(self._file, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def read_log(state: Path) -> list[dict[str, Any]]:
    """The events of a job's log, in order; a line that a kill cut short is left out."""
    file, found = state / LOG, []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def own_command() -> str:
    """The command line that goes on with what this process began, with torchrun where it began several."""
    program, arguments = Path(sys.argv[0]), [word for word in sys.argv[1:] if word not in _ANEW]
    ours = program.name in ("slimkit", "slimkit.exe") or program.parent.name == "slimkit"
    n = int(os.environ.get("WORLD_SIZE", "1") or "1")
    if n > 1:
        here, nodes = os.environ.get("LOCAL_WORLD_SIZE", str(n)), os.environ.get("GROUP_WORLD_SIZE", "1")
        begin = ["torchrun", *([] if nodes == "1" else ["--nnodes", nodes]), "--nproc-per-node", here]
        return shlex.join([*begin, *(["-m", "slimkit"] if ours else [str(program)]), *arguments])
    return shlex.join(["slimkit", *arguments] if ours else ["python", str(program), *arguments])
