"""A MindSpore block as `core.sparse.reconstruct` trains it: MindSpore's part is the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import replay
from slimkit_ms import bridge, kinds
from slimkit_ms.chain import first_tensor
from slimkit_ms.replay import TENSORS, quiet, unchanged
from slimkit_ms.sparse.slots import WeightSlot

import mindspore as ms
from mindspore import nn

Array = np.ndarray[Any, Any]


def norm_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """The scales and shifts of a model's norms by name, each once; what is called a norm is one."""
    found: dict[str, ms.Parameter] = {}
    for path, cell in model.cells_and_names():
        if kinds.is_norm(cell):
            own = {k: p for k, p in cell._params.items() if p is not None and p.ndim == 1 and p.is_floating_point()}
            found |= {f"{path}.{k}" if path else k: p for k, p in own.items() if not k.endswith(kinds.STATISTICS)}
    return found


class MindSporeTrained:
    """A block, the calls that calibration makes of it, and what they should give.

    Args:
        block: the block.
        slots: where the weights of the layers that are sparse lie, as seen from it.
        n_batches: how many calls there are.
        call: number -> (args, kwargs).
        target: number -> what the call should give.
        valid: for each call which tokens are no padding.
        aim: number -> what training draws the call's output to; None for the target itself.
    """

    def __init__(
        self,
        block: nn.Cell,
        slots: Sequence[WeightSlot],
        n_batches: int,
        call: Callable[[int], tuple[Any, Any]],
        target: Callable[[int], Array],
        valid: Sequence[Array | None],
        aim: Callable[[int], Array] | None = None,
    ) -> None:
        self._block, self._n_batches = block, n_batches
        self._call, self._target, self._valid = call, target, valid
        self._aim = target if aim is None else aim
        self._free: dict[str, Array] = {}
        self._parameters: dict[str, ms.Parameter] = {}
        known: dict[int, str] = {}
        for slot in slots:
            own = [(slot.key, slot.index, slot.parameter(block))]
            bias = slot.bias_parameter(block)
            own += [(str(slot.bias_key), slot.bias_index, bias)] if bias is not None else []
            for key, index, parameter in own:
                name = known.setdefault(id(parameter), f"{slot.cell}.{key}" if slot.cell else key)
                self._parameters[name] = parameter
                free = self._free.setdefault(name, np.zeros(parameter.shape, np.float32))
                place = slice(None) if index is None else index
                free[place] = slot.weight(block) != 0 if key == slot.key else 1.0
        for name, parameter in norm_parameters(block).items():
            if id(parameter) not in known:
                self._parameters[name], self._free[name] = parameter, np.ones(parameter.shape, np.float32)

    @property
    def parameters(self) -> dict[str, ms.Parameter]:
        """The parameters that are trained, by their names in the block."""
        return dict(self._parameters)

    def sizes(self) -> list[int]:
        """How many samples each batch has."""
        return [len(self._target(index)) for index in range(self._n_batches)]

    def start(self) -> dict[str, Array]:
        """Float32 copies of the parameters to train."""
        return {n: bridge.as_numpy(p.astype(ms.float32)) for n, p in self._parameters.items()}

    def free(self) -> dict[str, Array]:
        """Where their entries may change."""
        return self._free

    def target(self, index: int) -> tuple[Array, Array | None]:
        """What a batch's output should be, and which tokens count."""
        return self._target(index), self._valid[index]

    def loss(self, values: Mapping[str, Array], index: int, weights: Array) -> float:
        """The weighted squared error of a batch."""
        self.keep(values)
        with self._ready(index, self._target(index), weights) as error:
            return float(error().asnumpy())

    def slope(self, values: Mapping[str, Array], index: int, weights: Array) -> tuple[float, dict[str, Array]]:
        """The same about what training draws it to, with its gradient."""
        self.keep(values)
        parameters = list(self._parameters.values())
        trained = [p.requires_grad for p in parameters]
        try:
            for p in parameters:
                p.requires_grad = True
            with self._ready(index, self._aim(index), weights) as error, bridge.whole_gradient():
                loss, slopes = ms.value_and_grad(error, None, parameters)()
        finally:
            for p, before in zip(parameters, trained):
                p.requires_grad = before
        return float(loss.asnumpy()), {n: bridge.as_numpy(g.astype(ms.float32)) for n, g in zip(values, slopes)}

    def keep(self, values: Mapping[str, Array]) -> None:
        """Put the parameters in place, in their own dtype."""
        for name, value in values.items():
            parameter = self._parameters[name]
            parameter.set_data(ms.Tensor(np.ascontiguousarray(value, np.float32)).astype(parameter.dtype))

    @contextlib.contextmanager
    def _ready(self, index: int, wanted: Array, weights: Array) -> Iterator[Callable[[], ms.Tensor]]:
        args, kwargs = replay.fresh(self._call(index), TENSORS)
        target, factor = ms.Tensor(wanted), ms.Tensor(weights)

        def error() -> ms.Tensor:
            output = first_tensor(self._block(*args, **kwargs))
            return (factor * (output.astype(ms.float32) - target).square()).sum()

        with quiet(self._block), unchanged(self._block):
            yield error
