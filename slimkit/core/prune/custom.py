"""Rules of a user's own operators and layers, and what such a rule is handed.

The one table here is filled at run time, by `register_operator_rule`: it is the door through which users add rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import GraphError, SlimkitError
from slimkit.core.prune import shape_rules
from slimkit.core.prune.dims import Dim, factor, fix, product, total, unify
from slimkit.core.prune.graph import Node
from slimkit.core.prune.relations import Relations
from slimkit.core.showing import Shown

Axes = list[Dim]
CustomRule = Callable[["OperatorCall"], Sequence[Sequence[Dim]]]
# Operator or layer -> its rule: an operator's qualified name, or a module's class.
CUSTOM: dict[Any, CustomRule] = {}


class OperatorCall(Shown):
    """One call of a user's operator or layer, as its rule sees it.

    An axis is an opaque object with a `size`; what a rule says of axes holds index by index.

    Args:
        relations: the walk that meets the call.
        node: the call.
        inputs: axes of its tensors.

    Attributes:
        name: the operator's or layer's name.
        inputs: for each tensor argument its axes.
        parameters: of a layer, name ("weight", "inner.bias") -> its axes.
        arguments: the arguments that are no tensors, in their places (None where a tensor stood).
        shapes: of the outputs.
    """

    def __init__(self, relations: Relations, node: Node, inputs: Sequence[Axes]) -> None:
        names: Sequence[str] = node.attrs.get("parameters", ())
        n_inputs = len(inputs) - len(names)
        self._relations, self._numbers = relations, dict(zip(names, node.inputs[n_inputs:]))
        self.name = str(node.attrs["fn"])
        self.inputs: list[Axes] = [list(axes) for axes in inputs[:n_inputs]]
        self.parameters: Mapping[str, Axes] = dict(zip(names, map(list, inputs[n_inputs:])))
        self.arguments: Sequence[Any] = node.attrs.get("arguments", ())
        self.shapes = [relations.shape(node, k) for k in range(len(node.outputs))]

    def same(self, a: Dim, b: Dim) -> Dim:
        """Two axes are one: what is cut from one is cut from the other. Returns it."""
        if a.size != b.size:
            raise GraphError(f"the rule for {self.name} calls axes of {a.size} and {b.size} the same")
        unify(a, b)
        return a

    def whole(self, axis: Dim, why: str) -> Dim:
        """No index of an axis is ever cut. Returns it."""
        fix(axis, why)
        return axis

    def joined(self, axes: Sequence[Dim]) -> Dim:
        """The axis that putting some end to end gives, as a concatenation does."""
        return total(axes)

    def folded(self, axes: Sequence[Dim]) -> Dim:
        """The axis that flattening some gives, the outermost first."""
        return product(axes)

    def unfolded(self, axis: Dim, outer: int) -> tuple[Dim, Dim]:
        """An axis as (outer, inner), as a reshape to (..., outer, size // outer) does."""
        pair = factor(axis, outer)
        if pair is None:
            raise GraphError(f"the rule for {self.name} unfolds an axis of {axis.size} by {outer}")
        return pair

    def makes(self, parameter: str, axis: int) -> Dim:
        """The axis of a parameter whose indices are the channels that the layer makes; returned."""
        made = self.parameters[parameter][axis]
        self._relations.role(self._numbers[parameter], axis, "out")
        self._relations.layer(self._numbers[parameter], made)
        return made

    def reads(self, parameter: str, axis: int) -> Dim:
        """The axis of a parameter that meets the input's features; returned."""
        self._relations.role(self._numbers[parameter], axis, "in")
        return self.parameters[parameter][axis]


def custom(r: Relations, node: Node, x: list[Axes]) -> list[Axes]:
    """The neutral operator for all of these: its rule is looked up, called, and its answer checked."""
    call = OperatorCall(r, node, x)
    try:
        made = [list(axes) for axes in CUSTOM[node.attrs["rule"]](call)]
    except SlimkitError:
        raise
    except Exception as error:
        raise GraphError(f"the rule for {call.name} failed: {type(error).__name__}: {error}") from error
    sizes = [tuple(d.size for d in axes) for axes in made]
    if sizes != call.shapes:
        raise GraphError(f"the rule for {call.name} gives outputs of {sizes}, the operator made {call.shapes}")
    return made


def _elementwise(call: OperatorCall) -> Sequence[Axes]:
    node = Node("elementwise", (), tuple(range(len(call.shapes))), {})
    return shape_rules.broadcast(node, call.inputs)


SIMPLE: dict[str, CustomRule] = {"elementwise": _elementwise, "identity": lambda call: [call.inputs[0]]}


def set_rule(key: Any, rule: str | CustomRule | None) -> None:
    """Put a rule into the table, or take it out with None.

    Args:
        key: an operator's name or a layer's class, as the framework's door settled it.
        rule: "elementwise", "identity", or a function of an `OperatorCall` that returns the axes of each output.

    Raises:
        ArgumentError: an unknown word.
        ArgumentTypeError: neither a word nor a function.
    """
    if rule is None:
        CUSTOM.pop(key, None)
    elif isinstance(rule, str):
        CUSTOM[key] = SIMPLE[check.choice(rule, SIMPLE, "rule")]
    else:
        CUSTOM[key] = check.function(rule, "rule")
