"""The door for a user's own MindSpore primitives: what the pruner is to know of their axes."""

from __future__ import annotations

from typing import Any

from slimkit.core import check
from slimkit.core.prune.custom import CustomRule, set_rule
from slimkit_ms import bridge  # noqa: F401  (a missing framework gives one line)

from mindspore import ops

__all__ = ["register_operator_rule"]


def register_operator_rule(operator: Any, rule: str | CustomRule | None) -> None:
    """Teach the pruner how the axes of a primitive of your own relate.

    Args:
        operator: the primitive's name in a compiled graph, such as "BesselI0e", or a class of primitives. A cell cannot
            be one operator here: a compiled graph holds what it is made of.
        rule: "elementwise" (axes as in NumPy's broadcasting), "identity" (the first input's axes), or a function that
            is handed an `OperatorCall` and returns the axes of each output. None forgets the rule.

    Raises:
        ArgumentTypeError: `operator` or `rule` is of no such type.
        ArgumentError: an unknown word.

    Example:
        >>> register_operator_rule("BesselI0e", "elementwise")
        >>> register_operator_rule("BesselI0e", None)
    """
    if isinstance(operator, type) and issubclass(operator, ops.Primitive):
        operator = operator.__name__
    if not isinstance(operator, str) or not operator:
        check.wrong_type("operator", "a primitive's name or class", operator)
    set_rule(operator, rule)
