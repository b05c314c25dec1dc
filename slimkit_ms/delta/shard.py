"""Recording distribution strategies on MindSpore primitives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core.delta import shard as rules
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
    pairs = [pair for name, strategy in recorded.items() for pair in _primitives(operators[name], strategy)]
    for primitive, its in pairs:
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
    # An activation is a cell around one or several primitives, each over the same cut of the same values.
    found: list[tuple[Any, rules.Strategy]] = []
    for name, primitive in operator._primitives.items():
        if name in getattr(operator, "scalars", ("mul", "add") if isinstance(operator, nn.LogSigmoid) else ()):
            found.append((primitive, (strategy[0], ())))
        elif name in getattr(operator, "pairs", ()):
            found.append((primitive, (strategy[0], strategy[0])))
        elif isinstance(operator, nn.PReLU):
            found.append((primitive, (strategy[0], (1,))))
        else:
            found.append((primitive, strategy[:1]))
    if not found:
        raise rules.ShardError(f"{type(operator).__name__} has no operator of its own that takes a strategy.")
    return found
