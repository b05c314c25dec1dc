"""How public objects print and show themselves in a notebook: a title, and a short table of what they hold."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

_LONGEST = 88  # characters of one value in a table
_LINES = 12  # lines of one kind in a report's text
_NAMED = 4  # keys of a mapping that are written out


def brief(value: Any) -> str:
    """A value in one short line: numbers with six digits, of a collection its size and first keys.

    Example:
        >>> brief(0.123456789), brief({"a": 1, "b": 2}), brief([1, 2]), brief(None)
        ('0.123457', '2 entries: a, b', '2 entries', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (str, os.PathLike)):
        text = " ".join(str(value).split())
    elif isinstance(value, Mapping):
        names = ", ".join(str(key) for key in list(value)[:_NAMED])
        more = ", ..." if len(value) > _NAMED else ""
        text = f"{_entries(len(value))}: {names}{more}" if value else "none"
    elif isinstance(value, (Sequence, Set)):
        text = _entries(len(value)) if value else "none"
    elif hasattr(value, "shape"):
        text = f"{type(value).__name__} {tuple(value.shape)}"
    elif callable(value) and hasattr(value, "__name__"):
        text = str(value.__name__)
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number:,} entries"


def some(lines: Sequence[str], rest: str) -> list[str]:
    """The first dozen of many lines, and how many more there are and where.

    Example:
        >>> some(["a"] * 14, "report.skipped")[-1], some(["a"], "report.skipped")
        ('  ... and 2 more: report.skipped', ['a'])
    """
    left = len(lines) - _LINES
    return list(lines) if left <= 0 else [*lines[:_LINES], f"  ... and {left:,} more: {rest}"]


class Shown:
    """Prints as a title and a short table; a notebook gets the same as HTML."""

    def _rows(self) -> Iterable[tuple[str, Any]]:
        """(word, value) of each row; a dataclass shows its public fields, anything else its public attributes."""
        if dataclasses.is_dataclass(self):
            for item in dataclasses.fields(self):
                if not item.name.startswith("_"):
                    yield item.name, getattr(self, item.name)
        else:
            yield from ((name, value) for name, value in vars(self).items() if not name.startswith("_"))

    def _title(self) -> str:
        """The line above the table."""
        return type(self).__name__

    def __str__(self) -> str:
        rows = [(str(word), brief(value)) for word, value in self._rows()]
        width = max((len(word) for word, _ in rows), default=0)
        return "\n".join([self._title(), *(f"  {word:<{width}}  {value}" for word, value in rows)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(word))}</th>"
            f"<td style='text-align:left'>{html.escape(brief(value))}</td></tr>"
            for word, value in self._rows()
        )
        return f"<table><caption>{html.escape(self._title())}</caption><tbody>{rows}</tbody></table>"


class Report(Shown, dict[str, Any]):
    """What a job found, as plain values: a dict that prints as a short table.

    Example:
        >>> report = Report("sparsity", zeros=50, weights=100, layers=[1, 2])
        >>> print(report)
        sparsity
          zeros    50
          weights  100
          layers   2 entries
        >>> report["zeros"], report == {"zeros": 50, "weights": 100, "layers": [1, 2]}
        (50, True)
    """

    def __init__(self, what: str = "report", values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__({**(values or {}), **more})
        self._what = what

    def _rows(self) -> Iterable[tuple[str, Any]]:
        return self.items()

    def _title(self) -> str:
        return self._what

    def __reduce__(self) -> tuple[Any, ...]:
        return Report, (self._what, dict(self))
