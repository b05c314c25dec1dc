"""One training run of a command, alike in both frameworks: begun, stopped, gone on from, and known by its inputs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from slimkit.core.errors import ConfigError
from slimkit.core.jobs import folders
from slimkit.core.jobs.interrupt import SaveOnInterrupt
from slimkit.core.jobs.training import TrainingPlan
from slimkit.core.locks import same_job
from slimkit.core.train.callbacks import Checkpoints
from slimkit.core.train.runlog import ProgressBar
from slimkit.core.train.schedules import cosine_schedule, linear_schedule

_SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule, "constant": None}


class Wing(Protocol):
    """What a training run asks of a framework."""

    def train(
        self,
        model: Any,
        samples: Any,
        plan: TrainingPlan,
        loss: Callable[[Any, Any], Any],
        callbacks: list[Any],
        how: Mapping[str, Any],
    ) -> Any:
        """Train what wants a gradient with AdamW; `how` is what `Trainer.train` takes; returns the trainer."""


def fit(
    wing: Wing,
    model: Any,
    samples: Any,
    plan: TrainingPlan,
    out: Path,
    job: Mapping[str, Any],
    loss: Callable[[Any, Any], Any],
    collate: Callable[[list[Any]], Any] | None = None,
) -> dict[str, Any]:
    """Train a model in place, going on from an earlier checkpoint of the same job where there is one.

    Args:
        wing: the framework.
        model: what it trains.
        samples: a map-style data set, or a list of ready batches.
        plan: how to train.
        out: the result's folder; checkpoints lie in it until the result is there.
        job: everything that goes in, by value or digest; a resumed run must agree in it.
        loss: f(model, batch) -> scalar.
        collate: makes a batch of a list of samples.

    Returns:
        steps and loss_by_epoch.

    Raises:
        ConfigError: `out` holds something else, or the loss became no number.
        UnsupportedError: `out` holds an unfinished run with other inputs.
    """
    state = out / folders.STATE
    if plan.restart and state.is_dir():
        shutil.rmtree(out)
    folders.unused(out, state=folders.STATE)
    # As JSON gives it back, so that tuples compare like the lists that were read.
    same_job(state, json.loads(json.dumps({**job, "plan": plan.identity()})))
    stop = SaveOnInterrupt(state / "last")
    keep = Checkpoints(state, metric=None, every_n_steps=plan.save_every)
    schedule = _SCHEDULES[plan.schedule]
    how = {
        "num_epochs": plan.epochs,
        "per_device_batch_size": plan.batch_size,
        "gradient_clip_norm": plan.clip_norm,
        "create_scheduler_fn": None if schedule is None else schedule(plan.warmup),
        "max_num_train_steps": plan.max_steps,
        "seed": plan.seed,
        "collate_fn": collate,
        "resume_from": state / "last" if (state / "last").exists() else None,
    }
    try:
        trainer = wing.train(model, samples, plan, loss, [ProgressBar(), keep, stop], how)
    finally:
        stop.restore()
    losses = [float(v) for v in trainer.run_history.get_metric_values("train_loss_epoch")]
    if not all(map(math.isfinite, losses)):
        raise ConfigError(f"the loss became {losses[-1]}: give a lower --lr and --restart; nothing was saved")
    return {"steps": trainer.global_step, "loss_by_epoch": losses}


def share(sizes: Iterable[tuple[int, bool]]) -> dict[str, Any]:
    """Parameters, and those that train, of (size, whether it trains) of each.

    Example:
        >>> share([(6, False), (2, True)])
        {'parameters': 8, 'trained_parameters': 2, 'trained_share': 0.25}
    """
    all_sizes = list(sizes)
    total, trained = sum(n for n, _ in all_sizes), sum(n for n, trains in all_sizes if trains)
    return {"parameters": total, "trained_parameters": trained, "trained_share": trained / total}
