"""Recording distribution strategies on MindSpore primitives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core import shard as rules
from slimkit_ms import bridge

from mindspore import nn, ops

__all__ = ["bridge", "check_only", "record"]


def record(
    layer: nn.Cell,
    axes: Mapping[str, tuple[str, ...]],
    strategies: Mapping[str, Any],
    sizes: Mapping[str, int],
    operators: Mapping[str, Any],
) -> None:
    """Check every strategy of a layer, then record each on its primitives, in place.

    Args:
        layer: the layer; `layer.strategies` holds them afterwards.
        axes: operator -> axes of its inputs.
        strategies: operator -> strategy or None.
        sizes: axis letter -> width.
        operators: operator -> primitive, activation cell, or None where the layer has none.

    Raises:
        ShardError: a strategy does not fit; nothing is recorded.
    """
    recorded = check_only(layer, axes, strategies, sizes, operators)
    for name, strategy in recorded.items():
        for primitive, its in _primitives(operators[name], strategy):
            primitive.shard(its)
    layer.strategies = recorded


def check_only(
    layer: nn.Cell,
    axes: Mapping[str, tuple[str, ...]],
    strategies: Mapping[str, Any],
    sizes: Mapping[str, int],
    operators: Mapping[str, Any],
) -> dict[str, rules.Strategy]:
    """Check a layer's strategies without recording any; the arguments are those of `record`."""
    absent = tuple(name for name, operator in operators.items() if operator is None)
    activations = {n: type(o).__name__ for n, o in operators.items() if isinstance(o, nn.Cell)}
    return rules.check_strategies(type(layer).__name__, axes, strategies, sizes, absent, activations)


def _primitives(operator: Any, strategy: rules.Strategy) -> list[tuple[Any, rules.Strategy]]:
    """The primitives behind an operator, each with the strategy that fits its number of inputs."""
    if isinstance(operator, ops.Primitive):
        return [(operator, strategy)]
    # An activation is a cell around one or several primitives, each over the same cut.
    found = [p for _, cell in operator.cells_and_names() for p in cell._primitives.values() if p is not None]
    return [(p, strategy[:1]) for p in found if hasattr(p, "shard")]
