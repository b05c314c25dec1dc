"""The door for a user's own torch operators and layers: what the pruner is to know of their axes."""

from __future__ import annotations

from typing import Any

from slimkit import bridge  # noqa: F401  (a missing framework gives one line)
from slimkit.core import check
from slimkit.core.prune.custom import CustomRule, set_rule

import torch
from torch import nn

__all__ = ["register_operator_rule"]


def register_operator_rule(operator: Any, rule: str | CustomRule | None) -> None:
    """Teach the pruner how the axes of an operator or layer of your own relate.

    Args:
        operator: "library::name", the operator itself (`torch.ops.library.name`), or a module class whose forward is
            to count as one operator; subclasses have rules of their own.
        rule: "elementwise" (axes as in NumPy's broadcasting), "identity" (the first input's axes), or a function that
            is handed an `OperatorCall` and returns the axes of each output. None forgets the rule.

    Raises:
        ArgumentTypeError: `operator` or `rule` is of no such type.
        ArgumentError: an unknown word.

    Example:
        >>> class Double(nn.Module):
        ...     def forward(self, x):
        ...         return torch.cat([x, x], -1)
        >>> register_operator_rule(Double, lambda call: [[*call.inputs[0][:-1], call.joined([call.inputs[0][-1]] * 2)]])
        >>> register_operator_rule(Double, None)
    """
    set_rule(_key(operator), rule)


def _key(operator: Any) -> Any:
    if isinstance(operator, type) and issubclass(operator, nn.Module):
        return operator
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return str(operator._qualified_op_name)
    if isinstance(operator, torch._ops.OpOverload):
        return operator.name().partition(".")[0]
    if not isinstance(operator, str) or operator.count("::") != 1:
        check.wrong_type("operator", "'library::name', an operator of torch.ops, or a module class", operator)
    return operator
