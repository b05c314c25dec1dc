"""A torch block as `core.sparse.reconstruct` trains it: torch's part is the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge, kinds
from slimkit.core import replay
from slimkit.core.batch import Call, as_call
from slimkit.replay import TENSORS, quiet, unchanged
from slimkit.sparse.residual import first_tensor
from slimkit.sparse.slots import WeightSlot

import torch


def output_of(output: Any) -> torch.Tensor:
    """The hidden states or logits in what a block or a model gives."""
    if isinstance(output, Mapping):
        output = next(v for v in output.values() if isinstance(v, torch.Tensor))
    found: torch.Tensor = first_tensor(output)
    return found


def norm_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The scales and shifts of a model's norms by name, each once; what is called a norm is one."""
    found: dict[str, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        if kinds.is_norm(module):
            own = {k: p for k, p in module._parameters.items() if p is not None and p.ndim == 1}
            found |= {f"{path}.{k}" if path else k: p for k, p in own.items() if p.is_floating_point()}
    return found


class TorchTrained:
    """A block, the calls that calibration makes of it, and what they should give.

    Args:
        block: the block.
        slots: where the weights of the layers that are sparse lie, as seen from it.
        n_batches: how many calls there are.
        call: number -> call, or a batch of the user's.
        target: number -> what the call should give.
        valid: for each call which tokens are no padding.
        aim: number -> what training draws the call's output to; None for the target itself.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        slots: Sequence[WeightSlot],
        n_batches: int,
        call: Callable[[int], Any],
        target: Callable[[int], torch.Tensor],
        valid: Sequence[torch.Tensor | None],
        aim: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self._block, self._n_batches = block, n_batches
        self._call, self._target, self._valid = call, target, valid
        self._aim = target if aim is None else aim
        self._free: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        known: dict[int, str] = {}
        for slot in slots:
            for key, index, part in (
                (slot.key, slot.index, slot.weight(block)),
                (slot.bias_key, slot.bias_index, slot.bias(block)),
            ):
                parameter = slot.owner(block)._parameters.get(key) if key else None
                if parameter is None or part is None:
                    continue
                name = known.setdefault(id(parameter), f"{slot.module}.{key}" if slot.module else str(key))
                self._parameters[name] = parameter
                free = self._free.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32).detach())
                free[slice(None) if index is None else index] = (part != 0).float() if key == slot.key else 1.0
        for name, parameter in norm_parameters(block).items():
            if id(parameter) not in known:
                self._parameters[name], self._free[name] = parameter, torch.ones_like(parameter, dtype=torch.float32)

    @property
    def names(self) -> list[str]:
        """The parameters that are trained, as seen from the block."""
        return list(self._parameters)

    def sizes(self) -> list[int]:
        """How many samples each batch has."""
        return [len(self._target(index)) for index in range(self._n_batches)]

    def start(self) -> dict[str, torch.Tensor]:
        """Float32 copies of the parameters to train."""
        return {n: p.detach().to(torch.float32, copy=True) for n, p in self._parameters.items()}

    def free(self) -> dict[str, torch.Tensor]:
        """Where their entries may change."""
        return self._free

    def target(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a batch's output should be, and which tokens count."""
        target, valid = self._target(index).float(), self._valid[index]
        return target, valid if valid is None else valid.to(target.device)

    def loss(self, values: Mapping[str, torch.Tensor], index: int, weights: torch.Tensor) -> float:
        """The weighted squared error of a batch."""
        with self._ready() as run:
            return float(self._error(run(values, index), self._target(index), weights))

    def slope(
        self, values: Mapping[str, torch.Tensor], index: int, weights: torch.Tensor
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The same about what training draws it to, with its gradient."""
        leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
        with self._ready() as run, torch.enable_grad():
            error = self._error(run(leaves, index), self._aim(index), weights)
            found = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
        slopes = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(values.items(), found)}
        return float(error.detach()), slopes

    def keep(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put the parameters in place, in their own dtype."""
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)

    def _error(self, output: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (weights * (output.float() - wanted.float()).square()).sum()

    @contextlib.contextmanager
    def _ready(self) -> Iterator[Callable[[Mapping[str, torch.Tensor], int], torch.Tensor]]:
        def run(values: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
            batch = self._call(index)
            args, kwargs = replay.fresh(as_call(batch), TENSORS)
            if not isinstance(batch, Call):
                args, kwargs = bridge.to_device((args, kwargs), bridge.device_of(self._block))
            own = {n: v.to(self._parameters[n].dtype) for n, v in values.items()}
            with unchanged(self._block):
                return output_of(torch.func.functional_call(self._block, own, args, kwargs))

        with quiet(self._block):
            yield run
