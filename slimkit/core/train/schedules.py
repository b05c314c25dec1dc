"""Learning-rate schedules for `create_scheduler_fn`, alike in both wings: functions from the step to a factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slimkit.core import check

Factor = Callable[[int], float]


def linear_schedule(n_warmup: int = 0) -> Callable[[Any, int], Factor]:
    """Rise linearly over the first updates, then fall linearly to 0 at the last.

    Args:
        n_warmup: updates until the full rate.

    Returns:
        What `Trainer.train(create_scheduler_fn=...)` takes.

    Example:
        >>> factor = linear_schedule(2)(None, 6)
        >>> [factor(step) for step in (0, 2, 4, 6)]
        [0.0, 1.0, 0.5, 0.0]
    """
    return _schedule(n_warmup, lambda share: 1 - share)


def cosine_schedule(n_warmup: int = 0) -> Callable[[Any, int], Factor]:
    """Rise linearly over the first updates, then fall along half a cosine to 0 at the last (Loshchilov & Hutter 2017).

    Args:
        n_warmup: updates until the full rate.

    Example:
        >>> cosine_schedule()(None, 4)(2)
        0.5
    """
    return _schedule(n_warmup, lambda share: round((1 + math.cos(math.pi * share)) / 2, 12))


def constant_schedule(n_warmup: int = 0) -> Callable[[Any, int], Factor]:
    """Rise linearly over the first updates, then stay.

    Example:
        >>> constant_schedule(4)(None, 9)(1)
        0.25
    """
    return _schedule(n_warmup, lambda share: 1.0)


def _schedule(n_warmup: int, fall: Callable[[float], float]) -> Callable[[Any, int], Factor]:
    check.integer(n_warmup, "n_warmup", minimum=0)

    def create(optimizer: Any, n_updates: int) -> Factor:
        def factor(step: int) -> float:
            if step < n_warmup:
                return step / n_warmup
            return fall(min(1.0, (step - n_warmup) / max(1, n_updates - n_warmup)))

        return factor

    return create
