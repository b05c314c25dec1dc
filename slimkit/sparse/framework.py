"""What the sparsity walk asks of a torch model: its layers, their weights, and what flows into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge, together
from slimkit.core.sparse.allocate import changes
from slimkit.core.sparse.experts import learn_layouts
from slimkit.core.sparse.framework import CalibratedBlock
from slimkit.core.sparse.maths.layer import SparseLayer
from slimkit.core.sparse.processes import agreed, demand_tokens
from slimkit.replay import replaying
from slimkit.sparse.blocks import WholeModel, trace
from slimkit.sparse.chain import ModelBlock
from slimkit.sparse.inputs import BlockInputs, as_input, valid_tokens
from slimkit.sparse.reads import Reads
from slimkit.sparse.slots import WeightSlot, described
from slimkit.sparse.trained import norm_parameters, output_of

import torch


class TorchSparse:
    """A torch model behind the face that slimkit.core.sparse.compress asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.keeps_masks, self.deals = True, False
        self._layers: dict[str, SparseLayer] = {}
        self._slots: dict[str, WeightSlot] = {}

    def layers(self, dataset: Iterable[Any] | None = None) -> tuple[dict[str, SparseLayer], dict[str, str]]:
        """Every layer that can be sparse by name, and those that cannot with the reason.

        Args:
            dataset: batches; one is sent through where only a product shows how experts are laid out.
        """
        found, self._slots, skipped = described(self.model, with_meta=not self.keeps_masks)
        learn_layouts(found, self._slots, dataset, self._watch_products)
        self._layers = found
        return dict(found), skipped

    def _watch_products(self, slots: Mapping[str, WeightSlot], batch: Any, turned: Callable[[str], None]) -> None:
        with replaying(self.model) as run, Reads(self.model, slots, lambda *_: None, transposed=turned):
            run(batch)

    def weight(self, name: str) -> torch.Tensor:
        """The layer's weight, detached, in its own dtype."""
        return self._slots[name].weight(self.model)

    def store(self, name: str, weight: torch.Tensor, bias_shift: torch.Tensor | None) -> None:
        """Put a weight in place and shift the bias, in the parameters' own dtype and device."""
        self._slots[name].weight(self.model).copy_(weight)
        for slot in self._biased(name) if bias_shift is not None else ():
            bias = slot.bias(self.model)
            assert bias is not None  # it has one
            bias.copy_(bias.float() + bias_shift)

    def _biased(self, name: str) -> list[WeightSlot]:
        """Where the biases of a layer lie: layers that share a weight may each have one of their own."""
        found: dict[tuple[int, str], WeightSlot] = {}
        layer = self._layers.get(name)
        for path in (name, *(layer.aliases if layer is not None else ())):
            slot = self._slots[path]
            if slot.bias(self.model) is not None:
                found.setdefault(
                    (id(slot.owner(self.model)._parameters[str(slot.bias_key)]), str(slot.bias_index)), slot
                )
        return list(found.values())

    def not_finite(self) -> list[str]:
        """The parameters in memory that hold NaN or infinity."""
        real = [(n, p) for n, p in self.model.named_parameters() if p.is_floating_point() and p.device.type != "meta"]
        return [n for n, p in real if not bool(torch.isfinite(p).all())]

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Note on the layer that its zeros were made: a delta put on it later keeps them."""
        bridge.record_zeros(self._slots[name].owner(self.model))

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember weights and biases in main memory; the function returned puts them back."""
        kept = []
        for name in names:
            for part in (self._slots[name].weight, *(slot.bias for slot in self._biased(name))):
                value = part(self.model)
                assert value is not None  # a weight, or a bias that is there
                kept.append((part, value.to("cpu", copy=True)))
        norms = {n: p.detach().to("cpu", copy=True) for n, p in norm_parameters(self.model).items() if not p.is_meta}

        def restore() -> None:
            for part, value in kept:
                now = part(self.model)
                assert now is not None  # it was there when it was remembered
                now.copy_(value)
            with torch.no_grad():
                for name, value in norms.items():
                    self.model.get_parameter(name).copy_(value)

        return restore

    def stages(
        self, dataset: Iterable[Any], names: Sequence[str], paired: bool, residual: bool = False
    ) -> Iterator[CalibratedBlock]:
        """The parts of the model: what comes before a chain of blocks, each block, and the rest; or the whole."""
        modules: dict[str, tuple[str, WeightSlot]] = {}
        known: set[tuple[int, str, str]] = set()
        for name in names:
            for path in (name, *self._layers[name].aliases):
                slot = self._slots[path]
                place = id(slot.owner(self.model)), slot.key, str(slot.index)
                if place not in known:  # one module under two paths: one hook
                    known.add(place)
                    modules[path] = (name, slot)
        changing = {id(m): m for m in (self._slots[n].owner(self.model) for n in names)}
        changing |= {id(m): m for m in map(self._holder, norm_parameters(self.model))}
        dense = dense_twin(self.model, changing.values()) if paired else None
        blocks = block_paths(self.model, modules)
        inputs = BlockInputs(blocks)
        found, chained = trace(self.model, dataset, modules, blocks, inputs if blocks else None)
        demand_tokens(self, found)
        every = agreed(self, found.feeds)
        if not all(self.gather(chained)):
            del inputs
            yield WholeModel(self.model, dense, dataset, modules, every, found)
            return
        where = {name: next((b for b in blocks if name.startswith(b + ".")), "") for name in names}
        first = next(i for i, feed in enumerate(every) if where[feed[0]])
        before = [f for f in every[:first] if not where[f[0]]]
        after = [f for f in every[first:] if not where[f[0]]]
        if dense is not None:
            inputs.pair(dense, dataset)
        if before:
            yield WholeModel(self.model, dense, dataset, modules, before, found, whole=False)
            inputs.capture(self.model, dataset)
        if not after:  # nobody asks what leaves the last block with layers to do
            blocks = blocks[: 1 + max(blocks.index(where[f[0]]) for f in every if where[f[0]])]
        for block in blocks:
            feeds = [f for f in every if where[f[0]] == block]
            twin = bridge.get_module(dense, block) if dense is not None else None
            module, last = bridge.get_module(self.model, block), block == blocks[-1]
            yield ModelBlock(block, module, twin, inputs, modules, feeds, found, last)
        del inputs
        if after:
            yield WholeModel(self.model, dense, dataset, modules, after, found, whole=False)

    def _holder(self, parameter: str) -> torch.nn.Module:
        return bridge.get_module(self.model, parameter.rpartition(".")[0])

    def probing(self, dataset: Iterable[Any], names: Sequence[str]) -> Iterator[CalibratedBlock]:
        """The same parts for a walk that only looks."""
        return self.stages(dataset, names, paired=False)

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """A value that is made anew: nothing is left of earlier runs."""
        return make()

    def changes(
        self, probes: Sequence[Any], names: Sequence[str], variants: Sequence[Callable[[Sequence[str]], None]]
    ) -> list[list[float]]:
        """For each batch the power of the model's output, and what each variant changes of it."""
        return changes(self, probes, names, variants)

    def outputs(self, batch: Any) -> Any:
        """The model's first output for a batch, as a float32 NumPy array without the rows of padding."""
        with replaying(self.model) as run:
            output = run(batch)
        output = as_input(self.model, output_of(output), valid_tokens(batch))
        return output.float().cpu().numpy()

    def processes(self) -> int:
        """How many processes of torch.distributed share the calibration data."""
        return together.processes()

    def rank(self) -> int:
        """The number of this process of torch.distributed, from 0."""
        return together.rank()

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every process of torch.distributed, by its number."""
        return together.gather(value)

    def reduce(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over all processes of torch.distributed, when it runs."""
        import torch.distributed as dist

        if self.processes() < 2:
            return list(arrays)
        totals = [array.contiguous() for array in arrays]
        with together.exchanging():
            for array in totals:
                dist.all_reduce(array)
        return totals

    def spread(self, array: torch.Tensor, owner: int) -> torch.Tensor:
        """What the process with that number has, in all: the others hand in a tensor of its shape and type."""
        import torch.distributed as dist

        found = array.contiguous()
        with together.exchanging():
            dist.broadcast(found, owner)
        return found

    def swap(self, sent: torch.Tensor, gives: Sequence[int], gets: Sequence[int]) -> torch.Tensor:
        """Give every process its part of a flat array, and get as many numbers of each, in the processes' order."""
        import torch.distributed as dist

        got = sent.new_empty(sum(gets))
        with together.exchanging():
            dist.all_to_all_single(got, sent.contiguous(), list(gets), list(gives))
        return got


def dense_twin(model: torch.nn.Module, changing: Iterable[torch.nn.Module]) -> torch.nn.Module:
    """A copy of a model that keeps the weights and biases of some modules as they are; all else is shared."""
    own = {id(p) for module in changing for p in module._parameters.values() if p is not None}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    return copy.deepcopy(model, shared)


def block_paths(model: torch.nn.Module, modules: Mapping[str, Any]) -> list[str]:
    """The children of the list that holds most of the layers, if they are two or more of one class; else none."""
    best: list[str] = []
    covered = 0
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            # Inside a child, not the child itself: a list of plain layers is no chain of blocks.
            inside = {p for p in modules if p.startswith(path + ".") and "." in p[len(path) + 1 :]}
            own = {modules[p][0] for p in inside}
            # A layer shared with another place would be missed there.
            closed = all(p in inside for p, (name, _) in modules.items() if name in own)
            if len(inside) > covered and closed:
                best, covered = [f"{path}.{i}" for i in range(len(module))], len(inside)
    return best
