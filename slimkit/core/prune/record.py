"""What was cut from a model so far: its plans, kept with the model and its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slimkit.core.errors import FileFormatError, PlanError
from slimkit.core.prune.merging import merge_desc
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.replay import PLANS


def plans_of(model: Any) -> list[dict[str, Any]]:
    """The plans that cut a model, in order; the list is a copy."""
    return list(vars(model).get(PLANS, ()))


def record_plan(model: Any, desc: dict[str, Any]) -> Callable[[], None]:
    """Note that a plan has cut a model, in place; returns a call that takes the note back."""
    before = plans_of(model)
    vars(model)[PLANS] = [*before, desc]  # past __setattr__: frameworks look into what they are given

    def take_back() -> None:
        if before:
            vars(model)[PLANS] = before
        else:
            del vars(model)[PLANS]

    return take_back


def whole_desc(model: Any) -> dict[str, Any]:
    """The plan of everything that was cut from a model.

    Args:
        model: a model that slimkit has pruned.

    Returns:
        A plan that cuts the model as it was built to what it is now.

    Raises:
        PlanError: nothing was cut from the model.
    """
    plans = plans_of(model)
    if not plans:
        raise PlanError("nothing was pruned from this model")
    return merge_desc(*plans)


def check_begins(model: Any, plan: PrunePlan) -> None:
    """Refuse the plan of a later cut for a model that was cut before: no fresh model could be cut by it.

    Raises:
        FileFormatError: the plan does not begin at the model as it was built.
    """
    plans = plans_of(model)
    if plans and PrunePlan(plans[0]).shapes != plan.shapes:
        try:
            PrunePlan(plans[0]).match(plan.shapes)  # the same model in the other framework's names
        except PlanError as error:
            raise FileFormatError(
                f"desc must begin at the model as it was built, and this one was pruned {len(plans)} times: save it "
                f"with pruner.whole_desc(), or merge_desc(first, second, ...). {error}"
            ) from None
