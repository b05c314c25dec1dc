"""What may be done at points of a training run: the face of a callback."""

from __future__ import annotations

from typing import Any


class TrainerCallback:
    """What may be done at points of a training run; override the methods you need.

    Each method receives the trainer, whose `run_history`, `run_config`, `model`, `optimizer`, `epoch`, `global_step`
    and `stop(reason)` serve it. Any object with some of these methods is a callback; inheriting is not needed.

    Example:
        >>> class Say(TrainerCallback):
        ...     def on_epoch_end(self, trainer):
        ...         print(trainer.run_history.get_latest_metric("train_loss_epoch"))
    """

    def on_train_begin(self, trainer: Any) -> None:
        """Everything is ready and no batch was read."""

    def on_epoch_begin(self, trainer: Any) -> None:
        """An epoch begins."""

    def on_step_end(self, trainer: Any) -> None:
        """Parameters were updated once."""

    def on_evaluate_end(self, trainer: Any) -> None:
        """The evaluation of this epoch is in the history."""

    def on_epoch_end(self, trainer: Any) -> None:
        """Training and evaluation of this epoch are in the history."""

    def on_train_end(self, trainer: Any) -> None:
        """The run is over, also after an early stop; not after an error."""
