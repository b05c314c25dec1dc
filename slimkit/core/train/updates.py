"""The arguments of a training run that concern parameter updates: how many, how clipped, at which rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ConfigError


class UpdateOptions:
    """The checked arguments of one call of `train` that concern updates."""

    def __init__(
        self,
        num_epochs: int,
        accumulation: int,
        clip_value: float | None,
        clip_norm: float | None,
        create_scheduler_fn: Callable[..., Any] | None,
        max_steps: int | None,
    ) -> None:
        self.num_epochs = check.positive(num_epochs, "num_epochs")
        self.accumulation = check.positive(accumulation, "gradient_accumulation_steps")
        self.clip_value = _bound(clip_value, "gradient_clip_value")
        self.clip_norm = _bound(clip_norm, "gradient_clip_norm")
        self.max_steps = max_steps if max_steps is None else check.positive(max_steps, "max_num_train_steps")
        if create_scheduler_fn is not None:
            check.function(create_scheduler_fn, "create_scheduler_fn")
        self.create_scheduler_fn = create_scheduler_fn
        self.n_updates: int | None = None

    def plan(self, updates_per_epoch: int | None) -> None:
        """Know the number of updates of the whole run."""
        if self.max_steps is not None:
            self.n_updates = self.max_steps
        elif updates_per_epoch is not None:
            self.n_updates = self.num_epochs * updates_per_epoch

    def scheduler(self, optimizer: Any) -> Any:
        """What create_scheduler_fn makes of the optimizer, or None."""
        make = self.create_scheduler_fn
        if make is None:
            return None
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            parameters = list(inspect.signature(make).parameters.values())
        except ValueError:  # a built-in has no signature
            parameters = []
        required = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
        if len(required) < 2:
            return _scheduler(make(optimizer))
        if self.n_updates is None:
            raise ConfigError(
                "create_scheduler_fn asks for the number of updates, and the train_dataset has no length: "
                "give max_num_train_steps"
            )
        return _scheduler(make(optimizer, self.n_updates))


def _scheduler(made: Any) -> Any:
    if not (callable(made) or hasattr(made, "step")):
        check.wrong_type(
            "create_scheduler_fn's result", "a scheduler with step(), or a function from step to factor", made
        )
    return made


def factor_at(schedule: Callable[[int], Any], step: int) -> float:
    """The factor on the learning rate that a schedule gives for a step, as a float.

    Args:
        schedule: a function that returns an int, a float, or a tensor or array of one number.
        step: updates done so far.

    Raises:
        ArgumentTypeError: it returned no number.
        ArgumentError: it returned NaN, infinity or a negative number.

    Example:
        >>> factor_at(lambda step: 1, 0)
        1.0
    """
    given = schedule(step)
    name = f"the factor of create_scheduler_fn's schedule at step {step}"
    if isinstance(given, np.ndarray) and given.size == 1:
        given = given.item()
    if given is None or isinstance(given, (bool, str)):
        check.wrong_type(name, "a number", given)
    try:
        factor = float(given)
    except (TypeError, ValueError, RuntimeError):  # frameworks differ in what they raise
        check.wrong_type(name, "one number", given)
    return check.number(factor, name, minimum=0)


def _bound(value: float | None, name: str) -> float | None:
    if value is not None and not check.number(value, name) > 0:
        check.wrong_value(name, "a number above 0", value)
    return value
