"""Callbacks that write a training run down: CSV, JSON lines, TensorBoard, a progress bar or log lines."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.lazy import library
from slimkit.core.log import logger
from slimkit.core.train.callbacks import TrainerCallback


class _EpochLog(TrainerCallback):
    """Collects one row of metrics an epoch on the main process."""

    def __init__(self, path: str | Path) -> None:
        self.path = files.as_path(path, "path")
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, trainer: Any) -> None:
        if trainer.global_step == 0:
            self.rows = []

    def on_epoch_end(self, trainer: Any) -> None:
        history = trainer.run_history
        names = sorted(n for n in history.get_metric_names() if not n.endswith("_step"))
        row = {"epoch": trainer.epoch - 1, "step": trainer.global_step}
        self.rows.append({**row, **{n: history.get_latest_metric(n) for n in names}})
        if trainer.run_config.is_world_process_zero:
            self.write()

    def write(self) -> None:
        """Write all rows."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run goes on with the rows of the first."""
        return {"rows": json.dumps(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.rows = json.loads(state["rows"])


class CSVLogger(_EpochLog):
    """One row an epoch in a CSV file, whole at any time.

    Args:
        path: the file.
    """

    def write(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        with files.atomic_file(self.path, "w") as handle:
            handle.write(text.getvalue())


class JSONLogger(_EpochLog):
    """One JSON object an epoch, each on its line, whole at any time; null stands for NaN and infinity.

    Args:
        path: the file.
    """

    def write(self) -> None:
        with files.atomic_file(self.path, "w") as handle:
            for row in self.rows:
                shown = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                handle.write(json.dumps(shown, allow_nan=False) + "\n")


class TensorBoardLogger(TrainerCallback):
    """Every metric as a scalar for TensorBoard: those of steps by update, those of epochs by epoch.

    Args:
        directory: where the event file goes.

    Raises:
        MissingFrameworkError: the tensorboard package is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = files.as_path(directory, "directory")
        self._events = library("tensorboard.compat.proto.event_pb2", "dev").Event
        self._summaries = library("tensorboard.compat.proto.summary_pb2", "dev").Summary
        self._open = library("tensorboard.summary.writer.event_file_writer", "dev").EventFileWriter
        self._writer: Any = None
        self._written: dict[str, int] = {}

    def on_train_begin(self, trainer: Any) -> None:
        history = trainer.run_history
        # What a resumed run recorded before is in an older event file already.
        self._written = {name: len(list(history.get_metric_values(name))) for name in history.get_metric_names()}
        if trainer.run_config.is_world_process_zero:
            self._writer = self._open(str(self.directory))

    def on_epoch_end(self, trainer: Any) -> None:
        if self._writer is None:
            return
        for name in sorted(trainer.run_history.get_metric_names()):
            values = list(trainer.run_history.get_metric_values(name))
            for step, value in enumerate(values[self._written.get(name, 0) :], self._written.get(name, 0) + 1):
                summary = self._summaries(value=[self._summaries.Value(tag=name, simple_value=float(value))])
                self._writer.add_event(self._events(wall_time=time.time(), step=step, summary=summary))
            self._written[name] = len(values)
        self._writer.flush()

    def on_train_end(self, trainer: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar(TrainerCallback):
    """Show how far an epoch is: a bar with the time left on a terminal, log lines elsewhere.

    Args:
        every_s: seconds between two log lines.
    """

    def __init__(self, every_s: float = 5.0) -> None:
        self.every_s = check.number(every_s, "every_s", minimum=0)
        self._bar: Any = None
        self._task: Any = None
        self._began = self._last = 0.0
        self._first, self._tokens = 0, 0.0

    def on_epoch_begin(self, trainer: Any) -> None:
        self._began = self._last = time.monotonic()
        self._first, self._tokens = trainer.step_in_epoch, trainer.tokens_seen
        if sys.stderr.isatty() and trainer.run_config.is_local_process_zero:
            from rich.console import Console
            from rich.progress import Progress, TextColumn

            columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            total = trainer.run_config.num_update_steps_per_epoch or None
            self._task = self._bar.add_task(f"epoch {trainer.epoch}", total=total, completed=self._first, speed="")

    def on_step_end(self, trainer: Any) -> None:
        now = time.monotonic()
        spent = now - self._began
        read = trainer.tokens_seen - self._tokens
        speed = f"{read / spent:,.0f} tokens/s" if read and spent else ""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, speed=speed)
            return
        if now - self._last >= self.every_s and trainer.run_config.is_local_process_zero:
            self._last = now
            done, total = trainer.step_in_epoch, trainer.run_config.num_update_steps_per_epoch
            config = trainer.run_config
            all_updates = config.max_num_train_steps or (total or 0) * config.num_epochs
            more = max(0, all_updates - trainer.global_step) * spent / (done - self._first)
            left = f", about {more:.0f} s left" if total else ""
            logger.info(
                "epoch %d: %d of %s updates%s%s", trainer.epoch, done, total or "?", f", {speed}" if speed else "", left
            )

    def on_epoch_end(self, trainer: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if trainer.run_config.is_local_process_zero:
            history = trainer.run_history
            names = sorted(n for n in history.get_metric_names() if n.endswith("_epoch"))
            shown = ", ".join(f"{n.removesuffix('_epoch')} {float(history.get_latest_metric(n)):.4g}" for n in names)
            logger.info("epoch %d: %s", trainer.epoch - 1, shown)
