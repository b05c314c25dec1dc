"""The training loop both wings share: epochs, updates, history, callbacks, checkpoints and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slimkit.core import check
from slimkit.core.distill.joined import JoinedModels
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.log import logger
from slimkit.core.showing import Shown
from slimkit.core.train.callbacks import MOMENTS, method_of
from slimkit.core.train.counting import Counting
from slimkit.core.train.history import InMemoryRunHistory, RunHistory, TrainerRunConfig
from slimkit.core.train.loading import LoaderOptions
from slimkit.core.train.resume import Resumable
from slimkit.core.train.updates import UpdateOptions

PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class _Epochs:
    """What a run reads: its options, its last epoch, the batches of an epoch, and those to evaluate on."""

    options: UpdateOptions
    last: int
    batches: Callable[[int], Iterable[Any]]
    held_out: Callable[[], Iterable[Any]] | None


class TrainerLoop(Shown, Resumable, Counting):
    """A trainer without a framework: the wings add what touches a tensor, a device or a file of weights."""

    def __init__(
        self,
        model: Any,
        loss_func: Callable[[Any, Any], Any] | None = None,
        optimizer: Any = None,
        callbacks: Sequence[Any] = (),
        *,
        compute_loss: Callable[[Any, Any], Any] | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        run_history: RunHistory | None = None,
        mixed_precision: str | None = None,
        count_tokens: Callable[[Any], float] | None = None,
    ) -> None:
        if loss_func is not None and compute_loss is not None:
            raise ConfigError("give loss_func or compute_loss, not both: each says how a batch becomes a loss")
        for name, function in (
            ("loss_func", loss_func), ("compute_loss", compute_loss), ("count_tokens", count_tokens),
        ):  # fmt: skip
            if function is not None:
                check.function(function, name)
        if mixed_precision is not None:
            check.choice(mixed_precision, PRECISIONS, "mixed_precision")
        if run_history is not None:
            check.instance(run_history, RunHistory, "run_history")
        if not isinstance(callbacks, (list, tuple)):
            check.wrong_type("callbacks", "a list of callbacks", callbacks)
        for callback in callbacks:
            if not any(hasattr(callback, moment) for moment in MOMENTS):
                check.wrong_type("callbacks", f"objects with some of {', '.join(MOMENTS)}", callback)
        self.metrics = {
            check.text(k, "metrics"): check.function(f, f"metrics[{k!r}]") for k, f in (metrics or {}).items()
        }
        self.model = self._checked(model)
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.compute_loss = compute_loss
        self.callbacks = list(callbacks)
        self.run_history: RunHistory = run_history or InMemoryRunHistory()
        self.mixed_precision = mixed_precision
        self.count_tokens, self.tokens_seen = count_tokens, 0.0
        self.run_config: TrainerRunConfig | None = None
        self.epoch = self._first = 1
        self.global_step = 0
        self.step_in_epoch = 0
        self.seed = 0
        self.stop_reason: str | None = None
        self._losses, self._pending, self._terms, self._term_values = [], [], {}, {}
        self._epochs: _Epochs
        self._begin()

    def _rows(self) -> Iterator[tuple[str, Any]]:
        yield "model", type(self.model).__name__
        yield "loss", self.compute_loss or self.loss_func or "the model's own"
        yield "optimizer", type(self.optimizer).__name__ if hasattr(self.optimizer, "step") else self.optimizer
        yield "metrics", self.metrics
        yield "callbacks", ", ".join(type(callback).__name__ for callback in self.callbacks) or None
        yield "updates so far", self.global_step
        yield "stopped because", self.stop_reason

    # What a user calls.

    def train(
        self,
        train_dataset: Any,
        num_epochs: int,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: Callable[..., Any] | None = None,
        max_num_train_steps: int | None = None,
        seed: int | None = 0,
        *,
        gradient_clip_norm: float | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        train_dataloader_kwargs: Mapping[str, Any] | None = None,
        eval_dataloader_kwargs: Mapping[str, Any] | None = None,
        eval_per_device_batch_size: int | None = None,
        reset_run_history: bool = True,
        resume_from: str | Path | None = None,
    ) -> RunHistory:
        """Train the model in place.

        Args:
            train_dataset: a map-style data set of samples (`len` and indexing), which is shuffled and batched here; a
                stream of samples (PyTorch's IterableDataset, a mindspore.dataset without `batch`), which is batched
                in its own order; or ready batches: a list of them, or a data loader.
            num_epochs: passes over the training data.
            eval_dataset: the same kinds; evaluated after each epoch.
            per_device_batch_size: samples per batch and process; ready batches keep their own size.
            gradient_accumulation_steps: batches per parameter update.
            gradient_clip_value: bound on each gradient entry; None leaves them alone.
            create_scheduler_fn: f(optimizer), or f(optimizer, number of updates) when it requires two arguments; its
                scheduler is stepped after each update.
            max_num_train_steps: parameter updates in all; overrides num_epochs.
            seed: of the data order and of the framework's random numbers; None leaves the latter alone.
            gradient_clip_norm: bound on the norm of all gradients together.
            collate_fn: makes a batch from a list of samples.
            train_dataloader_kwargs: for the training loader: shuffle, drop_last, and what the framework's loader takes.
            eval_dataloader_kwargs: the same for evaluation.
            eval_per_device_batch_size: default: the training batch size.
            reset_run_history: False goes on after the epochs recorded by an earlier call.
            resume_from: a folder that `save_checkpoint` wrote; the run goes on as if it had never stopped.

        Returns:
            The run history: train_loss_step, train_loss_epoch (the mean of the finite ones), learning_rate, and
                eval_loss_epoch and eval_<metric>_epoch with an eval_dataset.

        Raises:
            ConfigError: an argument does not fit the others, or not the checkpoint.
        """
        options = UpdateOptions(
            num_epochs, gradient_accumulation_steps, gradient_clip_value, gradient_clip_norm, create_scheduler_fn,
            max_num_train_steps,
        )  # fmt: skip
        batch_size = check.positive(per_device_batch_size, "per_device_batch_size")
        eval_size = check.positive(eval_per_device_batch_size or batch_size, "eval_per_device_batch_size")
        if seed is not None:
            check.integer(seed, "seed", minimum=0)
        train_kwargs, eval_kwargs = dict(train_dataloader_kwargs or {}), dict(eval_dataloader_kwargs or {})
        if reset_run_history:
            self.run_history.reset()
        self.stop_reason, self.global_step, self.step_in_epoch = None, 0, 0
        self._losses, self._pending, self._terms, self._term_values = [], [], {}, {}
        self.epoch = self._first = first = self.run_history.current_epoch
        last = first + options.num_epochs - 1
        self.seed = self._start(seed)
        rank, world, local_rank = self._processes()

        def opened(data: Any, size: int, epoch: int, kwargs: dict[str, Any], shuffle: bool) -> Iterable[Any]:
            loading = LoaderOptions(self.seed, epoch, rank, world, collate_fn, {"shuffle": shuffle, **kwargs})
            return self._loader(data, size, loading)

        n_batches = _length(opened(train_dataset, batch_size, first, train_kwargs, True))
        per_epoch = math.ceil(n_batches / options.accumulation) if n_batches is not None else None
        if per_epoch == 0:
            check.wrong_value("train_dataset", "a data set with at least one batch", train_dataset)
        options.plan(per_epoch)
        if options.max_steps is not None and per_epoch:
            last = first + math.ceil(options.max_steps / per_epoch) - 1
        self.run_config = TrainerRunConfig(
            num_epochs=options.num_epochs,
            train_per_device_batch_size=batch_size,
            train_dl_kwargs={"shuffle": True, **train_kwargs},
            eval_per_device_batch_size=None if eval_dataset is None else eval_size,
            eval_dl_kwargs=None if eval_dataset is None else {"shuffle": False, **eval_kwargs},
            gradient_accumulation_steps=options.accumulation,
            gradient_clip_value=options.clip_value,
            train_total_batch_size=batch_size * options.accumulation * world,
            eval_total_batch_size=None if eval_dataset is None else eval_size * world,
            num_update_steps_per_epoch=per_epoch or 0,
            max_num_train_steps=options.max_steps,
            is_local_process_zero=local_rank == 0,
            is_world_process_zero=rank == 0,
            is_distributed=world > 1,
            mixed_precision=self.mixed_precision or "no",
        )
        try:
            self._prepare(options)
            if resume_from is not None:
                self._resume(Path(resume_from))
                last += self._first - first
            self._epochs = _Epochs(
                options,
                last,
                lambda epoch: opened(train_dataset, batch_size, epoch, train_kwargs, True),
                None if eval_dataset is None else lambda: opened(eval_dataset, eval_size, 0, eval_kwargs, False),
            )
            self._modes(True)
            self._fire("on_train_begin")
            self._drive()
            self._fire("on_train_end")
            self._meet()
        finally:
            self._modes(False)
            self._finish()
        return self.run_history

    def evaluate(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Mean loss and metrics over a data set; the model and the history are left as they are.

        Args:
            dataset: as in `train`.
            per_device_batch_size: samples per batch and process.
            collate_fn: makes a batch from a list of samples.
            dataloader_kwargs: for the loader.

        Returns:
            "loss" (when there is one) and each metric's mean over all samples.
        """
        size = check.positive(per_device_batch_size, "per_device_batch_size")
        rank, world, _ = self._processes()
        kwargs = {"shuffle": False, **(dataloader_kwargs or {})}
        return self._evaluate_batches(self._loader(dataset, size, LoaderOptions(0, 0, rank, world, collate_fn, kwargs)))

    def add_parameters(self, parameters: Sequence[Any]) -> None:
        """Let the optimizer train more parameters (which were frozen when it was made), in place.

        Args:
            parameters: those the optimizer holds already are left alone.
        """
        held = {id(p) for p in self._optimized()}
        fresh = [p for p in parameters if id(p) not in held]
        if fresh and self._processes()[1] > 1:
            raise UnsupportedError(
                "parameters cannot join a distributed run: make the optimizer over all of them first"
            )
        if fresh:
            self._optimize(fresh)

    def stop(self, reason: str) -> None:
        """End the run after this update (in a step's callback) or this epoch; callbacks call it.

        Args:
            reason: kept in `stop_reason`, and logged.
        """
        self.stop_reason = check.text(reason, "reason")
        logger.info("training stops: %s", reason)

    # The inside.

    def _fire(self, moment: str) -> None:
        for callback in self.callbacks:
            method_of(callback, moment)(self)

    def _drive(self) -> None:
        """Run the epochs: `_groups`, `_step` for each, `_close_epoch`, as long as `_more` says so."""
        while self._more():
            for group in self._groups():
                self._step(group)
            self._close_epoch()

    def _spent(self) -> bool:
        most = self._epochs.options.max_steps
        return most is not None and self.global_step >= most

    def _more(self) -> bool:
        return self.epoch <= self._epochs.last and self.stop_reason is None and not self._spent()

    def _groups(self) -> Iterator[list[Any]]:
        """Begin an epoch, or go on with a resumed one: the batches of each update, until something stops the run."""
        if self.step_in_epoch == 0:
            self._fire("on_epoch_begin")
        size = self._epochs.options.accumulation
        batches = iter(self._epochs.batches(self.epoch))
        done = self.step_in_epoch * size
        if done and len(list(islice(batches, done))) < done:
            raise ConfigError(f"resume_from: the checkpoint read {done} batches of this epoch, which has fewer")
        if not done:
            self._pending, self._term_values = [], {}
        while self.stop_reason is None and not self._spent() and (group := list(islice(batches, size))):
            yield group

    def _step(self, group: list[Any]) -> Any:
        """One update and what follows it; returns its loss, not waited for."""
        loss = self._update(group)
        self._saw(group)
        self._losses.append(loss)
        if isinstance(self.model, JoinedModels):
            for name, value in self.model.loss_terms().items():
                self._terms.setdefault(name, []).append(value)
        self.global_step += 1
        self.step_in_epoch += 1
        self._fire("on_step_end")
        return loss

    def _close_epoch(self) -> None:
        """Bring the epoch's means into the history, evaluate, and count it."""
        self._flush()
        if not self._pending and self.stop_reason is None and not self._spent():
            raise ConfigError(
                f"train_dataset gave no batch in epoch {self.epoch}: it must give its batches again in every epoch"
            )
        if self._pending:
            self.run_history.update_metric("train_loss_epoch", self._mean("loss", self._pending))
        for name, values in self._term_values.items():
            self.run_history.update_metric(f"train_{name}_epoch", self._mean(name, values))
        rate = self._learning_rate()
        if rate is not None:
            self.run_history.update_metric("learning_rate", rate)
        if self._epochs.held_out is not None:
            self._record(self._evaluate_batches(self._epochs.held_out()))
            self._fire("on_evaluate_end")
        # The epoch counter moves first: a checkpoint taken in on_epoch_end belongs to the next epoch's start.
        self.run_history._increment_epoch()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._fire("on_epoch_end")

    def _mean(self, name: str, values: Sequence[float]) -> float:
        """The mean of an epoch's finite values; NaN where there is none."""
        finite = [v for v in values if math.isfinite(v)]
        if len(finite) < len(values):
            left_out = len(values) - len(finite)
            logger.warning(
                "epoch %d: %d of %d values of %s are not finite and not in its mean",
                self.epoch,
                left_out,
                len(values),
                name,
            )
        return math.fsum(finite) / len(finite) if finite else math.nan

    def _record(self, found: Mapping[str, float]) -> None:
        for name, value in found.items():
            self.run_history.update_metric(f"eval_{name}_epoch", value)


def _length(items: Any) -> int | None:
    try:
        return len(items)
    except TypeError:
        return None
