"""The files that a walk over blocks leaves in its own folder, by the blocks' numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files


class BlockFiles:
    """Of each finished block its changed tensors and its rows of the report; what entered the next one.

    Args:
        folder: the walk's own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def done(self) -> int:
        """How many blocks are finished."""
        number = 0
        while self._rows(number).exists():
            number += 1
        return number

    def weights(self, number: int) -> Path:
        """The file of a block's changed tensors."""
        return self._folder / f"block-{number:05d}.safetensors"

    def activations(self, number: int) -> Path:
        """The folder of what enters a block."""
        return self._folder / f"activations-{number:05d}"

    def rows(self, number: int) -> dict[str, Any]:
        """A finished block's layers -> their rows of the report."""
        found: dict[str, Any] = files.read_json(self._rows(number))
        return found

    def finish(self, number: int, rows: Mapping[str, Any]) -> None:
        """Say that a block is done, all else of it being written: nobody needs what entered it any more."""
        files.write_json(self._rows(number), dict(rows))
        shutil.rmtree(self.activations(number), ignore_errors=True)

    def _rows(self, number: int) -> Path:
        return self._folder / f"block-{number:05d}.json"
