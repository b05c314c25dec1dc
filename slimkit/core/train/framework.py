"""What the trainer asks of a framework: the model, the data, one update, its state."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slimkit.core.train.loading import LoaderOptions
from slimkit.core.train.updates import UpdateOptions


class TrainFramework(ABC):
    """The framework's half of a trainer, which a wing's `Trainer` adds to `TrainerLoop`."""

    framework = ""

    # A run, from its beginning to its end.

    @abstractmethod
    def _checked(self, model: Any) -> Any:
        """The model, or ArgumentTypeError when it is none of this framework."""

    @abstractmethod
    def _begin(self) -> None:
        """The end of the constructor: what the wing itself holds."""

    @abstractmethod
    def _prepare(self, options: UpdateOptions) -> None:
        """Make optimizer, scheduler and whatever one update needs."""

    @abstractmethod
    def _loader(self, dataset: Any, batch_size: int, options: LoaderOptions) -> Iterable[Any]:
        """The batches of this process for one epoch."""

    @abstractmethod
    def _update(self, batches: list[Any]) -> Any:
        """One parameter update over the batches; returns their mean loss, not waited for."""

    @abstractmethod
    def _evaluate_batches(self, batches: Iterable[Any]) -> dict[str, float]:
        """Means over all samples of all processes."""

    @abstractmethod
    def _start(self, seed: int | None) -> int:
        """Seed the framework; returns the seed, drawn and shared between processes when None."""

    @abstractmethod
    def _modes(self, training: bool) -> None:
        """Put the model into training mode, or back to the modes it had."""

    @abstractmethod
    def _learning_rate(self) -> float | None:
        """The learning rate of the first group of parameters."""

    @abstractmethod
    def _optimized(self) -> list[Any]:
        """The parameters that the optimizer holds."""

    @abstractmethod
    def _optimize(self, parameters: list[Any]) -> None:
        """Give the optimizer more parameters."""

    @abstractmethod
    def _finish(self) -> None:
        """Undo what `_prepare` did to the model."""

    # Processes and numbers.

    @abstractmethod
    def _processes(self) -> tuple[int, int, int]:
        """(rank, world, rank on this node)."""

    @abstractmethod
    def _meet(self) -> None:
        """Wait at the end of a run until every process has come so far."""

    def asked_anywhere(self, number: int) -> int:
        """The largest of a small number of every process; each calls at the same place of the run."""
        return number

    @abstractmethod
    def _to_floats(self, losses: list[Any]) -> list[float]:
        """Losses as floats, averaged over processes."""

    @abstractmethod
    def _array(self, value: Any) -> Any:
        """A tensor as an array; None for anything else."""

    # Checkpoints.

    @contextlib.contextmanager
    def _saving(self) -> Iterator[bool]:
        """Everything around writing a checkpoint, in every process; gives whether this one writes."""
        yield self._processes()[0] == 0

    @abstractmethod
    def _save_state(self, folder: Path) -> dict[str, Any]:
        """Write weights, optimizer and scheduler; returns what goes into trainer.json (random state)."""

    @abstractmethod
    def _load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what `_save_state` wrote."""

    @abstractmethod
    def _load_model(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back the model's weights alone."""
