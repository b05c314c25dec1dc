"""Training that is asked to stop: the update is finished, a checkpoint is written, and only then does the run end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from slimkit.core.jobs.signals import SIGNALS, stopped_by
from slimkit.core.log import logger
from slimkit.core.train.callbacks import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Turn the first Ctrl-C or SIGTERM into a checkpoint and a stop; a second one stops at once.

    Args:
        directory: where the checkpoint goes, a folder for `train(resume_from=...)`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, trainer: Any) -> None:
        # Only the main thread may set handlers; elsewhere a signal stops at once, and the last checkpoint serves.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _ask(self, number: int, frame: Any) -> None:
        self.restore()
        self._asked = number
        logger.warning("stopping after this update; %s again stops at once", signal.Signals(number).name)

    def on_step_end(self, trainer: Any) -> None:
        # A signal reaches each process after another update: all stop after the same one.
        asked = trainer.asked_anywhere(self._asked or 0)
        if asked:
            trainer.save_checkpoint(self.directory)
            raise stopped_by(asked)

    def restore(self) -> None:
        """Put the handlers of before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
