"""Distribution strategies: how many pieces each axis of each operator's inputs is cut into, checked and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.core import check
from slimkit.core.delta.spec import key
from slimkit.core.errors import ArgumentError

# Axes: b batch, k input, n output, r rank, m bottleneck, h hidden; one operator cuts the same letter alike.
DENSE = {"matmul_org": ("bk", "nk"), "bias_org": ("bn", "n"), "activation_org": ("bn",)}
LORA = {
    "org_dense_matmul": ("bk", "nk"),
    "org_bias_add": ("bn", "n"),
    "lora_dropout": ("bk",),
    "lora_a_matmul": ("bk", "rk"),
    "lora_b_matmul": ("br", "nr"),
    "lora_mul": ("bn", ""),
    "lora_add": ("bn", "bn"),
    "activation": ("bn",),
}
ADAPTER = {
    "matmul_down_sampler": ("bh", "mh"),
    "bias_down_sampler": ("bm", "m"),
    "non_linearity": ("bm",),
    "matmul_up_sampler": ("bm", "hm"),
    "bias_up_sampler": ("bh", "h"),
    "residual_add": ("bh", "bh"),
}
LOW_RANK_ADAPTER = {
    "matmul_down_sampler_weight": ("hr", "rm"),
    "matmul_down_sampler_input": ("bh", "hm"),
    "bias_down_sampler": ("bm", "m"),
    "non_linearity": ("bm",),
    "matmul_up_sampler_weight": ("mr", "rh"),
    "matmul_up_sampler_input": ("bm", "mh"),
    "bias_up_sampler": ("bh", "h"),
    "residual_add": ("bh", "bh"),
}

Strategy = tuple[tuple[int, ...], ...]


# The parameters of each layer: path -> the operator that reads it, and which of that operator's inputs it is.
DENSE_PARAMETERS = {"weight": ("matmul_org", 1), "bias": ("bias_org", 1)}
ADAPTER_PARAMETERS = {
    f"mindpet_delta_adapter_block.mindpet_delta_adapter_{side}_sampler.{name}": (f"{operator}_{side}_sampler", 1)
    for side in ("down", "up")
    for name, operator in (("weight", "matmul"), ("bias", "bias"))
}
LOW_RANK_ADAPTER_PARAMETERS = {
    f"mindpet_delta_low_rank_adapter_{side}_sampler.{name}": (operator, index)
    for side in ("down", "up")
    for name, operator, index in (
        ("mindpet_delta_low_rank_adapter_weight_left", f"matmul_{side}_sampler_weight", 0),
        ("mindpet_delta_low_rank_adapter_weight_right", f"matmul_{side}_sampler_weight", 1),
        ("bias", f"bias_{side}_sampler", 1),
    )
}


def lora_parameters(name: str) -> dict[str, tuple[str, int]]:
    """The parameters of a linear layer with the LoRA of that name, as above.

    Example:
        >>> lora_parameters("default")["mindpet_delta_lora_a"]
        ('lora_a_matmul', 1)
    """
    return {
        "weight": ("org_dense_matmul", 1),
        "bias": ("org_bias_add", 1),
        key("lora", "a", name): ("lora_a_matmul", 1),
        key("lora", "b", name): ("lora_b_matmul", 1),
    }


def given(operators: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Operator -> strategy, from the arguments of a layer's `shard`, which are called `strategy_<operator>`.

    Example:
        >>> given({"matmul": ("bk", "nk")}, {"self": None, "strategy_matmul": ((1, 1), (2, 1))})
        {'matmul': ((1, 1), (2, 1))}
    """
    return {operator: arguments[f"strategy_{operator}"] for operator in operators}


def passed_on(operators: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's `shard` that its inner layer takes, by their own names."""
    return {f"strategy_{operator}": strategy for operator, strategy in given(operators, arguments).items()}


class ShardError(ArgumentError):
    """A distribution strategy does not fit its layer."""


def check_strategies(
    layer: str,
    operators: Mapping[str, tuple[str, ...]],
    given: Mapping[str, Any],
    sizes: Mapping[str, int],
    absent: tuple[str, ...] = (),
    activations: Mapping[str, str | None] | None = None,
) -> dict[str, Strategy]:
    """Check every strategy of a layer before any is recorded.

    Args:
        layer: the layer's class, for messages.
        operators: operator -> the axes of its inputs, one letter each.
        given: operator -> strategy (one tuple of cuts per input) or None for data parallel.
        sizes: letter -> the axis's width; a cut must divide it. The batch has none.
        absent: operators the layer does not have (no bias, no activation); their strategies are
            checked and ignored.
        activations: operator -> name of the activation there; LogSoftmax cannot be cut.

    Returns:
        operator -> strategy, of those given.

    Raises:
        ShardError: a strategy does not fit; the message names layer and operator.

    Example:
        >>> check_strategies("Dense", {"matmul": ("bk", "nk")}, {"matmul": ((2, 1), (4, 1))}, {"k": 8, "n": 8})
        {'matmul': ((2, 1), (4, 1))}
    """
    for operator, name in (activations or {}).items():
        if operator not in absent and name is not None and name.lower() in ("logsoftmax", "log_softmax"):
            raise ShardError(f"{layer}.shard: LogSoftmax is not supported in (semi-)automatic parallel: {operator}.")
    checked: dict[str, Strategy] = {}
    for operator, strategy in given.items():
        if strategy is None:
            continue
        axes = operators[operator]
        where = f"{layer}.shard: strategy_{operator}"
        _check_form(strategy, where)
        pieces = strategy
        if len(axes) == 1 and len(strategy) == 2 and strategy[0] == strategy[1]:
            pieces = strategy[:1]  # the documents write an activation's strategy for input and output
        if len(pieces) != len(axes):
            raise ShardError(f"{where} must hold {len(axes)} tuples, one per input. Received: {strategy!r}")
        cuts: dict[str, int] = {}
        for letters, cut in zip(axes, pieces):
            if len(cut) != len(letters):
                raise ShardError(f"{where} must cut an input of {len(letters)} axes. Received: {cut!r}")
            for letter, number in zip(letters, cut):
                if cuts.setdefault(letter, number) != number:
                    raise ShardError(f"{where} must cut the axis its inputs share alike. Received: {strategy!r}")
                if sizes.get(letter, number) % number:
                    raise ShardError(f"{where} must divide the axis of {sizes[letter]}. Received: {number}")
        if operator not in absent:
            checked[operator] = strategy
    return checked


def _check_form(strategy: Any, where: str) -> None:
    fine = isinstance(strategy, tuple) and all(
        isinstance(cut, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in cut)
        for cut in strategy
    )
    if not fine:
        raise ShardError(f"{where} must be a tuple of tuples of ints of at least 1. Received: {strategy!r}")


def parameter_cuts(
    operators: Mapping[str, tuple[str, ...]],
    recorded: Mapping[str, Strategy],
    parameters: Mapping[str, tuple[str, int]],
) -> dict[str, tuple[int | None, int]]:
    """Along which axis each parameter is cut, and into how many pieces.

    Args:
        operators: operator -> axes of its inputs.
        recorded: operator -> strategy.
        parameters: parameter -> (operator, index of the input that it is).

    Returns:
        parameter -> (axis, pieces); (None, 1) for one held whole everywhere.

    Raises:
        ShardError: a parameter would be cut along two axes.

    Example:
        >>> parameter_cuts({"matmul": ("bk", "nk")}, {"matmul": ((1, 1), (2, 1))}, {"weight": ("matmul", 1)})
        {'weight': (0, 2)}
    """
    cuts: dict[str, tuple[int | None, int]] = {}
    for name, (operator, index) in parameters.items():
        strategy = recorded.get(operator)
        numbers = strategy[index] if strategy is not None else (1,) * len(operators[operator][index])
        many = [(axis, n) for axis, n in enumerate(numbers) if n > 1]
        if len(many) > 1:
            raise ShardError(f"{operator} cuts {name} along two axes, which one row of devices cannot hold: {numbers}")
        cuts[name] = many[0] if many else (None, 1)
    found = {n for axis, n in cuts.values() if axis is not None}
    if len(found) > 1:
        raise ShardError(f"all parameters of a layer must be cut into the same number of pieces. Received: {found}")
    return cuts


def check_devices(pieces: int, devices: int) -> None:
    """Refuse a mesh whose size is not the number of pieces."""
    if pieces not in (1, devices):
        check.wrong_value("mesh", f"of {pieces} devices, as the strategies say", devices)
