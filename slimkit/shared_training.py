"""Training a model that processes hold parts of (FSDP2): what one process may do for itself, all do together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from slimkit import bridge
from slimkit.core.errors import UnsupportedError
from slimkit.sharded import at_rest, in_step, is_distributed, is_in_step, meshes_of, own_part

import torch
from torch import distributed, nn

_SMALL = 1e-6  # beside a norm that is divided by, as torch's own clipping has it


class SharedTraining:
    """A model whose parameters the processes hold parts of, as a trainer that splits the data sees it.

    Args:
        model: under `fully_shard`, whole or in its parts.
        world: processes among which the trainer splits the data.

    Raises:
        UnsupportedError: a parameter is shared out otherwise than by `fully_shard` over all processes.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        self.model, self.world = model, world
        self._steps: list[Any] = []
        meshes = meshes_of(model)
        for path, parameter in model.named_parameters():
            if not is_distributed(parameter):
                continue
            mesh = meshes.get(id(parameter))
            if mesh is None or mesh.size() != world:
                held = "not by fully_shard" if mesh is None else f"over {mesh.size()} of {world} processes"
                raise UnsupportedError(
                    f"model must be shared out by fully_shard over all processes of the training, which split the "
                    f"data. {path} is shared out {held}: train it by a loop of your own."
                )
            self._like = parameter

    @classmethod
    def of(cls, model: nn.Module, world: int) -> SharedTraining | None:
        """The same for a model of which anything is shared out, else None."""
        at_rest(model)  # gathered copies look like whole parameters
        return cls(model, world) if any(map(is_distributed, model.parameters())) else None

    def begin(self) -> None:
        """Let parameters that every process holds whole begin alike, and have their gradients averaged; in place."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and not is_distributed(parameter) and not is_in_step(parameter):
                self._steps += in_step(self._like, [parameter])
        self.settle()

    def end(self) -> None:
        """Undo what `begin` did to gradients."""
        for handle in self._steps:
            handle.remove()
        self._steps = []

    def settle(self) -> None:
        """Give every process the first one's buffers (means of batch norms), in place; parameters hold their parts."""
        at_rest(self.model)
        for buffer in self.model.buffers():
            if not is_distributed(buffer):
                distributed.broadcast(buffer, src=0)

    def clip(self, parameters: Iterable[nn.Parameter], value: float | None, norm: float | None) -> None:
        """Bound each entry of the gradients, and then the norm of all of them together, in place."""
        at_rest(self.model)
        found = [p.grad for p in parameters if p.grad is not None]
        own = [own_part(g) for g in found]
        for grad in own if value is not None else ():
            grad.clamp_(-value, value)  # type: ignore[operator]
        if norm is not None and found:
            factor = (norm / (self.norm(found) + _SMALL)).clamp(max=1.0)
            for grad in own:
                grad.mul_(factor.to(grad.device, grad.dtype))

    def norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients together, the same in every process; what is whole in each counts once."""
        shared, whole = [], []
        for grad in gradients:
            square = torch.linalg.vector_norm(own_part(grad), dtype=torch.float32).square()
            if is_distributed(grad):
                copies = [size for size, at in zip(grad.device_mesh.shape, grad.placements) if at.is_replicate()]
                shared.append(square / _product(copies))
            else:
                whole.append(square)
        total = torch.stack(shared).sum() if shared else torch.zeros((), device=self._device)
        distributed.all_reduce(total)
        return (total + sum(whole)).sqrt()

    def rounds(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """The batches of this process and whether they count: all processes run the model equally often.

        A forward needs every process. Who has run out runs a batch again that does not count.
        """
        own, nothing = iter(batches), object()
        last: Any = nothing
        while True:
            batch = next(own, nothing)
            count = torch.tensor(float(batch is not nothing), device=self._device)
            distributed.all_reduce(count)
            if not count:
                return
            if last is nothing and count < self.world:  # someone has none at all
                lent = [batch if batch is not nothing else None]
                distributed.broadcast_object_list(lent, src=0)
                last = lent[0]
            yield (last, False) if batch is nothing else (batch, True)
            last = last if batch is nothing else batch

    @property
    def _device(self) -> torch.device:
        return bridge.device_of(self.model)


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def one_by_one(parameters: Iterable[Any]) -> bool | None:
    """What `foreach` an optimizer needs: no call takes parts and whole tensors together."""
    return False if len({is_distributed(p) for p in parameters}) > 1 else None
