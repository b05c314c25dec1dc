"""Blocks of a walk over files for which nothing is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slimkit.core.sparse.maths.backend import Array


class DatalessBlock:
    """A block of a method that needs no data."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.changed: list[str] = []
        self.rows: Mapping[str, dict[str, Any]] | None = None
        self.feeds: list[tuple[str, ...]] = []
        self.joined: dict[str, str] = {}
        self.reached: Mapping[str, float] = {}

    def replay(self, names: Sequence[str], seen: Any, ended: Callable[[], None] | None = None) -> None:
        """No data."""

    def join(self) -> None:
        """No stream."""

    def outputs(self) -> Iterator[Array]:
        """No batches."""
        return iter(())

    def trained(self, inherited: float = 1.0) -> None:
        """Nothing to train by."""

    def advance(self) -> None:
        """No activations."""


class FinishedBlock(DatalessBlock):
    """A block that an earlier run finished."""

    def __init__(self, names: list[str], rows: dict[str, Any]) -> None:
        super().__init__(names)
        self.rows = rows
