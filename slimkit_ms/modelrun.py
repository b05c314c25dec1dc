"""The trainer's updates as `mindspore.train.Model` runs them: a network, its data and what ends an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slimkit.core.train.loop import TrainerLoop
from slimkit_ms import bridge  # noqa: F401  (says in one line that MindSpore is missing)

import mindspore as ms
from mindspore import nn


class Update(nn.Cell):
    """One parameter update as the network that `mindspore.train.Model` runs; it holds the model and its optimizer."""

    def __init__(self, trainer: TrainerLoop) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.optimizer = trainer.model, trainer.optimizer
        self._trainer = trainer

    def set_train(self, mode: bool = True) -> Update:
        # The trainer has set the modes; cells put into eval mode on purpose must stay there.
        return self

    def __call__(self, *group: Any) -> Any:
        # Not construct: the update runs as Python, and compiles its gradient in GRAPH mode.
        return self._trainer._step(list(group))


class Feed:
    """The batches of a run as `mindspore.train.Model` reads a data set: one row an update, epoch after epoch."""

    def __init__(self, trainer: TrainerLoop) -> None:
        self._trainer = trainer
        self._rows: Iterator[list[Any]] | None = None

    def get_dataset_size(self) -> int:
        config = self._trainer.run_config
        assert config is not None
        return config.num_update_steps_per_epoch or 2**31 - 1  # unknown: steps are then counted through

    def create_tuple_iterator(self, **_: Any) -> Feed:
        return self

    def reset(self) -> None:
        self._rows = None

    def __next__(self) -> tuple[Any, ...]:
        if self._rows is None:
            self._rows = self._trainer._groups()
        return tuple(next(self._rows))


class EpochEnd(ms.train.Callback):
    """Closes the trainer's epoch, and ends the run when the trainer says so."""

    def __init__(self, trainer: TrainerLoop) -> None:
        self._trainer = trainer

    def on_train_epoch_end(self, run_context: Any) -> None:
        self._trainer._close_epoch()
        if not self._trainer._more():
            run_context.request_stop()
