"""The most memory that the process held during a piece of work."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The high-water mark of resident memory inside a ``with`` block, in bytes.

    Linux alone can begin anew to count (proc(5), clear_refs); elsewhere nothing is known and `n_bytes` stays None.
    """

    def __init__(self) -> None:
        self.n_bytes: float | None = None
        self._counting = False

    def __enter__(self) -> Peak:
        try:
            _CLEAR.write_text("5")
            self._counting = True
        except OSError:
            self._counting = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counting:
            lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
            self.n_bytes = 1024.0 * int(lines["VmHWM"].split()[0])
