"""The table of ONNX operators that ATC's documents name, kept as data in operators.json with its sources."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimkit.core import check

TABLE = Path(__file__).with_name("operators.json")


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The whole table; its "about" says what the keys mean."""
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def opsets(text: str) -> frozenset[int]:
    """Opset numbers from "9,11-13".

    Example:
        >>> sorted(opsets("9,11-13"))
        [9, 11, 12, 13]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        numbers.update(range(int(low), int(high or low) + 1))
    return frozenset(numbers)


@dataclass(frozen=True)
class Support:
    """What the documents of one CANN generation say of one operator.

    Args:
        named: whether the list of operators names it.
        opsets: the opsets given for it, empty when only the list was read.
        text: the same as the table writes it.
    """

    named: bool
    opsets: frozenset[int]
    text: str


class Generation:
    """One CANN version's part of the table.

    Args:
        cann: "8.0", "8.0.RC3", "5.0.4" ...; the first number decides.

    Raises:
        ArgumentError: not a version, or of a generation the table does not hold.
    """

    def __init__(self, cann: str) -> None:
        found = re.fullmatch(r"([0-9]{1,2})([.][0-9A-Za-z]{1,12}){0,4}", check.text(cann, "cann"))
        known = table()["generations"]
        if not found or found[1] not in known:
            check.wrong_value("cann", f'a CANN version from {min(known)} to {max(known)}, such as "8.0"', cann)
        self.cann, self.number = cann, found[1]
        self._row = known[self.number]
        self.range_text: str = self._row["opsets"]
        self.opsets = opsets(self.range_text)

    @property
    def sources(self) -> list[dict[str, str]]:
        """The documents behind this part of the table."""
        return [table()["sources"][key] for key in self._row["sources"]]

    def support(self, operator: str) -> Support:
        """What the documents say of an operator of the default domain."""
        row = table()["operators"].get(operator, {})
        key = self._row["table"]
        if key not in row:
            return Support(False, frozenset(), "")
        text = row.get(self.number, row[key])
        return Support(True, opsets(text) if text else frozenset(), text or "")


def float_inputs(operator: str) -> tuple[list[str], str] | None:
    """The float dtypes an operator's page names, and the page; None where the page names all or was not read."""
    row = table()["float_inputs"].get(operator)
    return (row["dtypes"], row["source"]) if row else None
