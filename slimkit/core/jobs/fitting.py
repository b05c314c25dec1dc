"""How jobs train, alike in both frameworks: once, or begun, stopped and gone on from, and known by their inputs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.core.errors import ConfigError
from slimkit.core.joblog import JobLog
from slimkit.core.jobs import crew, folders
from slimkit.core.jobs.fields import Spell
from slimkit.core.jobs.framework import ComputeLoss, FitRun, JobFramework
from slimkit.core.jobs.interrupt import SaveOnInterrupt
from slimkit.core.jobs.options import FitOptions
from slimkit.core.locks import same_job
from slimkit.core.train.callbacks import Checkpoints
from slimkit.core.train.runlog import ProgressBar
from slimkit.core.train.schedules import constant_schedule, cosine_schedule, linear_schedule

_SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule, "constant": constant_schedule}

Collate = Callable[[list[Any]], Any]


class Diverged(ConfigError):
    """The loss became no number: the same job would end there again."""


def fit(
    face: JobFramework,
    model: Any,
    options: FitOptions,
    samples: Any,
    loss: ComputeLoss,
    *,
    seed: int,
    spell: Spell,
    collate: Collate | None = None,
    callbacks: Sequence[Any] = (),
    resume_from: Path | None = None,
    tokens: Callable[[Any], float] | None = None,
) -> dict[str, Any]:
    """Train the parameters of a model that want a gradient, in place.

    Args:
        face: the framework.
        model: what it trains.
        options: how to train.
        samples: a map-style data set, or ready batches.
        loss: f(model, batch) -> scalar.
        seed: of the order, and of everything drawn on the way.
        spell: how the user writes an option, for messages.
        collate: makes a batch of a list of samples.
        callbacks: for the trainer.
        resume_from: a checkpoint to go on from.
        tokens: batch -> over how many tokens its loss is a mean.

    Returns:
        steps, loss_by_epoch and loss_by_step.

    Raises:
        ConfigError: nothing trains, or the loss became no number.
    """
    if not any(trains for _, trains in face.sizes(model)):
        raise ConfigError("no parameter of the model is trainable")
    flat = options.schedule == "constant" and not options.warmup
    how = {
        "num_epochs": options.epochs,
        "per_device_batch_size": share_of(options, samples, spell("batch_size")),
        "gradient_clip_norm": options.gradient_clip_norm or None,
        "gradient_clip_value": options.gradient_clip_value,
        "create_scheduler_fn": None if flat else _SCHEDULES[options.schedule](options.warmup),
        "max_num_train_steps": options.max_steps,
        "seed": seed,
        "collate_fn": collate,
        "resume_from": resume_from,
    }
    trainer = face.train(model, samples, options, loss, list(callbacks), how, tokens)
    values = trainer.run_history.get_metric_values
    losses = [float(v) for v in values("train_loss_epoch")]
    if not all(map(math.isfinite, losses)):
        raise Diverged(f"the loss became {losses[-1]}: give a lower {spell('learning_rate')}; nothing was saved")
    return {
        "steps": trainer.global_step,
        "loss_by_epoch": losses,
        "loss_by_step": [float(v) for v in values("train_loss_step")],
    }


def share_of(options: FitOptions, samples: Any, option: str) -> int:
    """How many samples of an update this process reads at once; ready batches keep their own size.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    ready = isinstance(samples, (list, tuple))
    return options.batch_size if ready else crew.share_of(options.batch_size, option)


def defaults(kind: type[FitOptions]) -> dict[str, Any]:
    """What options that may be left out are then, as plain JSON values."""
    from pydantic_core import to_jsonable_python

    fields = {k: f for k, f in kind.model_fields.items() if not f.is_required()}
    found: dict[str, Any] = to_jsonable_python({k: f.get_default(call_default_factory=True) for k, f in fields.items()})
    return found


def begin(options: FitOptions, out: Path, run: FitRun, job: Mapping[str, Any]) -> Path:
    """Begin a run's state in its folder, or make sure that the one there is of the same job.

    Args:
        options, out, run, job: as for `fit_resumably`, which does this too.

    Returns:
        The state's folder.
    """
    state = out / folders.STATE
    if run.restart and state.is_dir():
        shutil.rmtree(state)
    plan = {key: getattr(options, key) for key in FitOptions.model_fields} | {"seed": run.seed}
    # As JSON gives it back, so that tuples compare like the lists that were read.
    usual = defaults(type(options))
    same_job(state, {**job, "plan": plan}, {**usual, "plan": usual})
    JobLog(state).begun("training")
    return state


def fit_resumably(
    face: JobFramework,
    model: Any,
    options: FitOptions,
    samples: Any,
    loss: ComputeLoss,
    out: Path,
    run: FitRun,
    job: Mapping[str, Any],
    *,
    spell: Spell,
    collate: Collate | None = None,
    tokens: Callable[[Any], float] | None = None,
) -> dict[str, Any]:
    """Train like `fit`, going on from an earlier checkpoint of the same job where there is one.

    Args:
        face, model, options, samples, loss, spell, collate, tokens: as for `fit`.
        out: the result's folder; checkpoints lie in it until the result is there.
        run: how the state is kept.
        job: everything else that goes in, by value or digest; a resumed run must agree in it.

    Returns:
        What `fit` returns.

    Raises:
        ConfigError: `out` holds something else, or the loss became no number.
        UnsupportedError: `out` holds an unfinished run with other inputs.
    """
    state = Path(face.once(lambda: str(begin(options, out, run, job))))
    stop = SaveOnInterrupt(state / "last")
    keep = Checkpoints(state, metric=None, every_n_steps=run.save_every)
    callbacks = [ProgressBar(), keep, stop]
    earlier = state / "last" if (state / "last").exists() else None
    try:
        return fit(
            face, model, options, samples, loss,
            seed=run.seed, spell=spell, collate=collate, callbacks=callbacks, resume_from=earlier,
            tokens=tokens,
        )  # fmt: skip
    except Diverged:
        if crew.rank() == 0:
            shutil.rmtree(state)  # what it holds leads nowhere
        raise
    except BaseException as error:
        if crew.rank() == 0:
            JobLog(state).stopped(error)
        raise
    finally:
        stop.restore()


def share(sizes: Iterable[tuple[int, bool]]) -> dict[str, Any]:
    """Parameters, and those that train, of (size, whether it trains) of each.

    Example:
        >>> share([(6, False), (2, True)])
        {'parameters': 8, 'trained_parameters': 2, 'trained_share': 0.25}
    """
    all_sizes = list(sizes)
    total, trained = sum(n for n, _ in all_sizes), sum(n for n, trains in all_sizes if trains)
    return {"parameters": total, "trained_parameters": trained, "trained_share": trained / total}
