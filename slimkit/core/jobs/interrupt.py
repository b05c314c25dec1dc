"""Ctrl-C during training: the update is finished, a checkpoint is written, and only then does the run stop."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from slimkit.core.log import logger
from slimkit.core.train.callbacks import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """Turn the first Ctrl-C into a checkpoint and a stop; a second one stops at once.

    Args:
        directory: where the checkpoint goes, a folder for `train(resume_from=...)`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._asked = False
        self._before: Any = None

    def on_train_begin(self, trainer: Any) -> None:
        # Only the main thread may set handlers; elsewhere Ctrl-C stops at once, and the last checkpoint serves.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.restore()
        self._asked = True
        logger.warning("stopping after this update; Ctrl-C again stops at once")

    def on_step_end(self, trainer: Any) -> None:
        if self._asked:
            trainer.save_checkpoint(self.directory)
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Put the handler of before back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
