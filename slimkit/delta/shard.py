"""From recorded strategies to distributed tensors: the plan that ``layer.shard(...)`` returns in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit import bridge
from slimkit.core.delta import shard as rules

import torch
from torch import nn

__all__ = ["ShardPlan", "bridge", "plan"]


class ShardPlan:
    """Which parameters of one layer are cut, and where.

    Args:
        layer: the layer.
        strategies: operator -> strategy, as recorded.
        cuts: parameter path -> (axis, pieces).
    """

    def __init__(
        self, layer: nn.Module, strategies: Mapping[str, rules.Strategy], cuts: Mapping[str, tuple[int | None, int]]
    ) -> None:
        self.layer, self.strategies, self.cuts = layer, dict(strategies), dict(cuts)

    def apply(self, mesh: Any) -> nn.Module:
        """Turn the layer's parameters into distributed tensors, in place; inputs and outputs stay ordinary tensors.

        Args:
            mesh: a one-dimensional DeviceMesh whose size is the number of pieces.

        Returns:
            The layer. Its input must be the same on every device of the mesh.

        Raises:
            ArgumentError: the mesh has another size.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        for _, pieces in self.cuts.values():
            rules.check_devices(pieces, mesh.size())
        for path, parameter in list(self.layer.named_parameters()):
            axis, _ = self.cuts.get(path, (None, 1))
            place = Replicate() if axis is None else Shard(axis)
            owner = self.layer.get_submodule(path.rpartition(".")[0])
            whole = distribute_tensor(parameter.detach(), mesh, [place])
            setattr(owner, path.rpartition(".")[2], nn.Parameter(whole, requires_grad=parameter.requires_grad))

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(x, mesh, [Replicate()])
                if isinstance(x, torch.Tensor) and type(x) is not DTensor
                else x
                for x in args
            )

        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            return output.redistribute(mesh, [Replicate()]).to_local()

        self.layer.register_forward_pre_hook(enter)
        self.layer.register_forward_hook(leave)
        return self.layer


def plan(
    layer: nn.Module,
    operators: Mapping[str, tuple[str, ...]],
    strategies: Mapping[str, Any],
    sizes: Mapping[str, int],
    parameters: Mapping[str, tuple[str, int]],
    optional: Mapping[str, Any],
) -> ShardPlan:
    """Check and record a layer's strategies, in place.

    Args:
        layer: the layer; `layer.strategies` holds them afterwards.
        operators: operator -> axes of its inputs.
        strategies: operator -> strategy or None.
        sizes: axis letter -> width.
        parameters: parameter path -> (operator, which of its inputs).
        optional: operator -> the bias or activation it needs; None where the layer has none.

    Returns:
        The plan.

    Raises:
        ShardError: a strategy does not fit.
    """
    absent = tuple(operator for operator, part in optional.items() if part is None)
    activations = {o: type(m).__name__ for o, m in optional.items() if isinstance(m, nn.Module)}
    name = type(layer).__name__
    recorded = rules.check_strategies(name, operators, strategies, sizes, absent, activations)
    cuts = rules.parameter_cuts(operators, recorded, {p: o for p, o in parameters.items() if o[0] not in absent})
    layer.strategies = recorded
    return ShardPlan(layer, recorded, cuts)
