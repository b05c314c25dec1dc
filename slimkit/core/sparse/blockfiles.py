"""The files that a walk over blocks leaves in its own folder, by the blocks' numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.sparse.processes import Crew, first


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

    def kept(self, crew: Crew, what: str, make: Callable[[], Any]) -> Any:
        """A plain JSON value that an earlier run has found out; else all processes make it, and it is kept."""
        file = self._folder / f"{what}.json"
        found = first(crew, lambda: [files.read_json(file)] if file.exists() else [])
        if found:
            return found[0]
        value = make()
        first(crew, lambda: files.write_json(file, value))
        return value

    def write(
        self,
        crew: Crew,
        number: int,
        rows: Mapping[str, Any],
        weights: Callable[[Path], None],
        activations: Callable[[Path], None] | None,
    ) -> None:
        """Write a block by process 0, and what enters the next by those that have it; it is done then.

        Args:
            crew: the processes.
            number: the block's.
            rows: its layers -> their rows of the report.
            weights: writes its changed tensors, as one file or not at all.
            activations: writes what enters the next block into a folder; None where none does.
        """
        following = self.activations(number + 1)
        part = following.with_name(f".{following.name}.part")

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
            part.mkdir()

        def end() -> None:
            if activations is not None:
                shutil.rmtree(following, ignore_errors=True)
                part.rename(following)
            weights(self.weights(number))
            files.write_json(self._rows(number), dict(rows))
            shutil.rmtree(self.activations(number), ignore_errors=True)  # nobody needs what entered it any more

        if activations is not None:
            first(crew, begin)
            activations(part)
            crew.gather(None)  # all are written
        first(crew, end)

    def _rows(self, number: int) -> Path:
        return self._folder / f"block-{number:05d}.json"
