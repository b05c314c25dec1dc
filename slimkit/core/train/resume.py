"""Checkpoints of a training run: what is written, and how a run goes on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core import files
from slimkit.core.errors import ConfigError, FileFormatError, UnsupportedError
from slimkit.core.log import logger
from slimkit.core.train.callbacks import method_of
from slimkit.core.train.framework import TrainFramework
from slimkit.core.train.history import RunHistory, TrainerRunConfig

VERSION = 1


class Resumable(TrainFramework):
    """The half of a trainer that remembers: losses not yet in the history, checkpoints, and going on from one."""

    run_history: RunHistory
    run_config: TrainerRunConfig | None
    callbacks: list[Any]
    seed: int
    epoch: int
    step_in_epoch: int
    global_step: int
    _first: int
    _losses: list[Any]  # of updates since the last flush, still on the device
    _pending: list[float]  # of the epoch being run
    _terms: dict[str, list[Any]]  # the parts of those losses, if the model has them
    _term_values: dict[str, list[float]]

    def save_checkpoint(self, directory: str | Path) -> Path:
        """Write everything that `train(resume_from=...)` needs: weights, optimizer, scheduler, random state, history.

        Every process of a run calls it. The first one writes; of a model that they hold parts of (FSDP2) it writes
        whole tensors, one at a time, so that any number of processes goes on from it.

        Args:
            directory: the folder; it appears whole or not at all, replacing an older one. No file in it is a pickle.

        Returns:
            The folder.

        Raises:
            UnsupportedError: a state that could not be read back as it is; an older checkpoint stays.
            OSError: the disk is full, or the folder cannot be written.
        """
        target = files.as_path(directory, "directory")
        self._flush()
        with self._saving() as writes:
            if writes:
                self._write(target)
        return target

    def _write(self, target: Path) -> None:
        config = self.run_config.to_dict() if self.run_config else {}
        with files.atomic_directory(target) as folder:
            state = self._save_state(folder)
            history = self.run_history
            files.write_json(
                folder / "trainer.json",
                {
                    "version": VERSION,
                    "framework": self.framework,
                    "seed": self.seed,
                    "first_epoch": self._first,
                    "epoch": self.epoch,
                    "step_in_epoch": self.step_in_epoch,
                    "global_step": self.global_step,
                    "batch_size": config.get("train_total_batch_size"),
                    "gradient_accumulation_steps": config.get("gradient_accumulation_steps"),
                    "history": {
                        k: _json(list(history.get_metric_values(k))) for k in sorted(history.get_metric_names())
                    },
                    "pending": _json(self._pending),
                    "terms": {name: _json(values) for name, values in self._term_values.items()},
                    "callbacks": [
                        [type(callback).__name__, _json(kept)]
                        for callback in self.callbacks
                        if (kept := method_of(callback, "state_dict")()) is not None
                    ],
                    "state": state,
                },
            )

    def _flush(self) -> None:
        """Bring the losses of the updates since the last call into the history."""
        if not self._losses:
            return
        values = self._to_floats(self._losses)
        self._losses = []
        for name, found in self._terms.items():
            # Once an epoch would do; a checkpoint within the epoch must not forget them.
            self._term_values[name] = self._term_values.get(name, []) + self._to_floats(found)
        self._terms = {}
        self._pending = self._pending + values
        for value in values:
            self.run_history.update_metric("train_loss_step", value)
        if not all(map(math.isfinite, values)):
            logger.warning("epoch %d: a training loss is not finite", self.epoch)

    def load_weights(self, directory: str | Path) -> None:
        """Take the model's weights, and nothing else, out of a checkpoint, in place: the best epoch's, for example.

        Args:
            directory: a folder that `save_checkpoint` wrote.

        Raises:
            FileFormatError: no such checkpoint.
        """
        folder = files.as_path(directory, "directory")
        self._load_model(folder, self._read(folder, "directory")["state"])

    def _read(self, folder: Path, name: str) -> dict[str, Any]:
        kept = files.read_json(folder / "trainer.json", name)
        if not isinstance(kept, dict) or kept.get("version") != VERSION or kept.get("framework") != self.framework:
            raise FileFormatError(f"{folder} holds no checkpoint of this trainer (version {VERSION}, {self.framework})")
        return kept

    def _resume(self, folder: Path) -> None:
        kept = self._read(folder, "resume_from")
        assert self.run_config is not None
        for name, now in (
            ("seed", self.seed),
            ("batch_size", self.run_config.train_total_batch_size),
            ("gradient_accumulation_steps", self.run_config.gradient_accumulation_steps),
        ):
            if kept[name] != now:
                raise ConfigError(f"resume_from: the checkpoint was made with {name} {kept[name]}, this run has {now}")
        states = self._states(_unjson(kept["callbacks"]))
        for callback, state in states:
            method_of(callback, "on_resume")(self, state)
        self._load_state(folder, kept["state"])
        self.run_history.reset()
        for name, values in kept["history"].items():
            for value in values:
                self.run_history.update_metric(name, _unjson(value))
        while self.run_history.current_epoch < kept["epoch"]:
            self.run_history._increment_epoch()
        self.epoch, self.step_in_epoch = kept["epoch"], kept["step_in_epoch"]
        self.global_step, self._first = kept["global_step"], kept["first_epoch"]
        self._pending = [_unjson(v) for v in kept["pending"]]
        self._term_values = {name: [_unjson(v) for v in values] for name, values in kept["terms"].items()}
        for callback, state in states:
            method_of(callback, "load_state_dict")(state)

    def _states(self, kept: list[list[Any]]) -> list[tuple[Any, Any]]:
        """Each callback with the state that one of its kind left in the checkpoint, in order."""
        left, found = list(kept), []
        for callback in self.callbacks:
            for entry in left:
                if entry[0] == type(callback).__name__:
                    found.append((callback, entry[1]))
                    left.remove(entry)
                    break
        if left:
            logger.warning("the checkpoint's callbacks %s have no successor in this run", [kind for kind, _ in left])
        return found


def _json(value: Any) -> Any:
    """A nested value as JSON, which has no inf and nan, and whose floats must come back to the last bit."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UnsupportedError(f"a checkpoint cannot hold a dict whose keys are no str: {value!r:.80}")
        return {key: _json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (int, str)):
        return value
    try:
        return {"float": repr(float(value))}  # a number of NumPy or a framework too
    except (TypeError, ValueError, RuntimeError):  # frameworks differ in what they raise
        raise UnsupportedError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}") from None


def _unjson(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: _unjson(v) for k, v in value.items()}
    return [_unjson(v) for v in value] if isinstance(value, list) else value
