"""The record of a training run: metrics by epoch, and the immutable facts of how it was run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from slimkit.core.showing import Shown, brief


class RunHistory(Shown, ABC):
    """What a trainer records about its run: the epoch it is in, and the values of each metric."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """The epoch being run, counted from 1."""

    @abstractmethod
    def get_metric_names(self) -> Iterable[str]:
        """The names of all metrics recorded, each once."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[Any]:
        """Every value recorded for a metric, oldest first; empty if there is none."""

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> Any:
        """The value recorded last for a metric; ValueError if there is none."""

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record one more value of a metric."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Begin the next epoch; called by the trainer."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything: epoch 1, no metrics."""


class InMemoryRunHistory(RunHistory):
    """A run history held in memory.

    Example:
        >>> history = InMemoryRunHistory()
        >>> history.update_metric("loss", 0.5)
        >>> history.get_latest_metric("loss")
        0.5
    """

    def __init__(self) -> None:
        self._current_epoch = 1
        self._metrics: dict[str, list[Any]] = {}

    def _rows(self) -> Iterator[tuple[str, Any]]:
        yield "epoch", self._current_epoch
        for name, values in self._metrics.items():
            yield name, f"{brief(values[-1])} (last of {len(values)})" if values else None

    @property
    def current_epoch(self) -> int:
        return self._current_epoch

    def get_metric_names(self) -> set[str]:
        return set(self._metrics)

    def get_metric_values(self, metric_name: str) -> list[Any]:
        # A copy, and no entry made by asking: reading the history must not change it.
        return list(self._metrics.get(metric_name, ()))

    def get_latest_metric(self, metric_name: str) -> Any:
        values = self._metrics.get(metric_name)
        if not values:
            raise ValueError(f"No values have been recorded for the metric {metric_name}")
        return values[-1]

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        self._metrics.setdefault(metric_name, []).append(metric_value)

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def reset(self) -> None:
        self._current_epoch = 1
        self._metrics = {}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and metrics as plain JSON values, for a checkpoint."""
        return {"current_epoch": self._current_epoch, "metrics": {k: list(v) for k, v in self._metrics.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._current_epoch = int(state["current_epoch"])
        self._metrics = {k: list(v) for k, v in state["metrics"].items()}


@dataclass(frozen=True)
class TrainerRunConfig(Shown):
    """How a run is being trained; a trainer makes it, and nobody changes it.

    Args:
        num_epochs: epochs asked for.
        train_per_device_batch_size: training samples per step on each device.
        train_dl_kwargs: what the training data loader was made with.
        eval_per_device_batch_size: evaluation samples per step on each device.
        eval_dl_kwargs: what the evaluation data loader was made with.
        gradient_accumulation_steps: batches per parameter update.
        gradient_clip_value: bound on each gradient entry; None leaves them alone.
        train_total_batch_size: samples per parameter update, over all devices and accumulation steps.
        eval_total_batch_size: evaluation samples per step, over all devices.
        num_update_steps_per_epoch: parameter updates in one epoch.
        max_num_train_steps: bound on all parameter updates; overrides num_epochs when given.
        is_local_process_zero: whether this is the main process of its node.
        is_world_process_zero: whether this is the main process of all nodes.
        is_distributed: whether several processes train together.
        mixed_precision: "fp16", "bf16" or "no".
    """

    num_epochs: int
    train_per_device_batch_size: int
    train_dl_kwargs: dict[str, Any] = field(hash=False)
    eval_per_device_batch_size: int | None
    eval_dl_kwargs: dict[str, Any] | None = field(hash=False)
    gradient_accumulation_steps: int
    gradient_clip_value: float | None
    train_total_batch_size: int
    eval_total_batch_size: int | None
    num_update_steps_per_epoch: int
    max_num_train_steps: int | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_distributed: bool
    mixed_precision: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, for reports."""
        return asdict(self)
