"""What may be done at points of a training run: the face of a callback, and those that steer the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from slimkit.core import check, files
from slimkit.core.errors import ConfigError
from slimkit.core.freezer import Freezer
from slimkit.core.showing import Shown


class TrainerCallback(Shown):
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

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint of the run keeps of the callback; None for nothing."""
        return None

    def on_resume(self, trainer: Any, state: Mapping[str, Any]) -> None:
        """A run goes on, and its optimizer's state is not loaded yet; `state` is what `state_dict` gave."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A run goes on, with everything loaded: take back what `state_dict` gave."""


# At each of these an object may have something to do; with one of them it is a callback.
MOMENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_resume")


def method_of(callback: Any, name: str) -> Callable[..., Any]:
    """A method of a callback, by its name in TrainerCallback, which has the one that does nothing."""
    nothing: Callable[..., Any] = partial(getattr(TrainerCallback, name), callback)
    return getattr(callback, name, nothing)


class EarlyStopping(TrainerCallback):
    """Stop when a metric has not improved for some epochs.

    Args:
        metric: a name in the run history; NaN and infinity are no improvement, and never the best.
        patience: epochs without improvement that are waited for.
        mode: "min" or "max".
        min_delta: what counts as an improvement.

    Example:
        >>> EarlyStopping("eval_accuracy_epoch", patience=2, mode="max").patience
        2
    """

    def __init__(
        self, metric: str = "eval_loss_epoch", patience: int = 3, mode: str = "min", min_delta: float = 0.0
    ) -> None:
        self.best = Best(metric, mode, min_delta)
        self.patience = check.positive(patience, "patience")
        self.waited = 0

    def on_epoch_end(self, trainer: Any) -> None:
        self.waited = 0 if self.best.improved(trainer) else self.waited + 1
        if self.waited >= self.patience:
            best = "been finite" if self.best.value is None else f"improved on {self.best.value:.6g}"
            trainer.stop(f"{self.best.metric} has not {best} for {self.waited} epochs")

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best.value, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.best.value, self.waited = state["best"], state["waited"]


class Checkpoints(TrainerCallback):
    """Keep the last state of a run, and the best one by a metric, ready for `train(resume_from=...)`.

    Args:
        directory: `last` and `best` appear in it, each whole or not at all.
        metric: which metric says what is best; None keeps the last alone.
        mode: "min" or "max".
        every_n_epochs: how often `last` is written.
        every_n_steps: write `last` within an epoch too.
    """

    def __init__(
        self,
        directory: str | Path,
        metric: str | None = "eval_loss_epoch",
        mode: str = "min",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
    ) -> None:
        self.directory = files.as_path(directory, "directory")
        self.best = None if metric is None else Best(metric, mode, 0.0)
        self.every_n_epochs = check.positive(every_n_epochs, "every_n_epochs")
        self.every_n_steps = None if every_n_steps is None else check.positive(every_n_steps, "every_n_steps")

    def on_step_end(self, trainer: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.directory / "last")

    def on_epoch_end(self, trainer: Any) -> None:
        # Judged before either is written, so that a run resumed from `last` knows the best value too.
        if self.best is not None and self.best.improved(trainer):
            trainer.save_checkpoint(self.directory / "best")
        if (trainer.epoch - 1) % self.every_n_epochs == 0:
            trainer.save_checkpoint(self.directory / "last")

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": None if self.best is None else self.best.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if self.best is not None:
            self.best.value = state["best"]


class Best:
    """The best value of a metric so far."""

    def __init__(self, metric: str, mode: str, min_delta: float) -> None:
        self.metric = check.text(metric, "metric")
        self.sign = 1 if check.choice(mode, ("min", "max"), "mode") == "min" else -1
        self.min_delta = check.number(min_delta, "min_delta", minimum=0)
        self.value: float | None = None

    def improved(self, trainer: Any) -> bool:
        """Whether the latest value is finite and the best; ConfigError when the run does not record the metric."""
        known = sorted(trainer.run_history.get_metric_names())
        if self.metric not in known:
            raise ConfigError(
                f"metric must be one of {known}. Received: {self.metric!r}{check.near(self.metric, known)}"
            )
        now = float(trainer.run_history.get_latest_metric(self.metric))
        # A NaN or an infinite value is never the best: nothing could improve on it.
        better = math.isfinite(now) and (
            self.value is None or self.sign * now < self.sign * self.value - self.min_delta
        )
        if better:
            self.value = now
        return better


class GradualUnfreezing(TrainerCallback):
    """Unfreeze one more group of layers every few epochs, from the output towards the input (Howard & Ruder 2018).

    Args:
        freezer: a `ModelFreezer` whose `freeze` was called.
        every_n_epochs: epochs between two groups.
    """

    def __init__(self, freezer: Any, every_n_epochs: int = 1) -> None:
        self.freezer: Freezer = check.instance(freezer, Freezer, "freezer", "a ModelFreezer")
        self.every_n_epochs = check.positive(every_n_epochs, "every_n_epochs")
        self.n_open = 1

    def on_epoch_end(self, trainer: Any) -> None:
        self._open(trainer, 1 + (trainer.epoch - 1) // self.every_n_epochs)

    def _open(self, trainer: Any, n_groups: int) -> None:
        while self.n_open < min(n_groups, len(self.freezer.get_layer_groups())):
            self.n_open += 1
            found = self.freezer.unfreeze(-self.n_open, -self.n_open)
            trainer.add_parameters([p for group in found.values() for p in group["params"]])

    def on_resume(self, trainer: Any, state: Mapping[str, Any]) -> None:
        """Open the groups that were open, before the optimizer's state is loaded."""
        # The state is as long as the parameters that were open.
        self._open(trainer, state["n_open"])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"n_open": self.n_open}
