"""What the sparsity walk asks of a torch model: its layers, their weights, and what flows into them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slimkit import bridge
from slimkit.core.sparse.layer import Layer
from slimkit.core.sparse.walk import Stage
from slimkit.sparse.inputs import BlockInputs, as_input, quiet, valid_tokens
from slimkit.sparse.residual import first_tensor
from slimkit.sparse.stages import BlockStage, ModelStage, trace

import torch


class TorchHost:
    """A torch model behind the face that slimkit.core.sparse.compress asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.keeps_masks = True
        self._layers: dict[str, Layer] = {}

    def layers(self) -> tuple[dict[str, Layer], dict[str, str]]:
        """Every Linear, Hugging Face Conv1D and Conv2d by name, and those that cannot be sparse with the reason."""
        found: dict[str, Layer] = {}
        skipped: dict[str, str] = {}
        owner: dict[int, str] = {}
        tables = {
            id(m.weight) for m in self.model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))
        }
        for name, module in self.model.named_modules(remove_duplicate=False):
            kind = kind_of(module)
            if kind is None:
                continue
            weight = module._parameters.get("weight")
            if weight is None:
                skipped[name] = "its weight is computed, not a parameter"
            elif not weight.is_floating_point():
                skipped[name] = f"its weight is {weight.dtype}, which has no linear algebra"
            elif weight.device.type == "meta" and self.keeps_masks:
                skipped[name] = "its weight is on the meta device"
            elif id(weight) in tables:
                skipped[name] = "its weight is tied to an embedding"
            elif id(weight) in owner:
                first = found[owner[id(weight)]]
                found[first.name] = Layer(**{**first.__dict__, "aliases": (*first.aliases, name)})
            else:
                owner[id(weight)] = name
                found[name] = _describe(name, kind, module, weight)
        self._layers = found
        return dict(found), skipped

    def weight(self, name: str) -> torch.Tensor:
        """The layer's weight, detached, in its own dtype."""
        return bridge.get_module(self.model, name).weight.detach()

    def store(self, name: str, weight: torch.Tensor, bias_shift: torch.Tensor | None) -> None:
        """Put a weight in place and shift the bias, in the parameters' own dtype and device."""
        module = bridge.get_module(self.model, name)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias_shift is not None:
                module.bias.copy_(module.bias.float() + bias_shift)

    def settled(self, name: str, row: dict[str, Any]) -> None:
        """Nothing to do: the report is made at the end."""

    def snapshot(self, names: Sequence[str]) -> Callable[[], None]:
        """Remember weights and biases in main memory; the function returned puts them back."""
        kept = []
        for name in names:
            module = bridge.get_module(self.model, name)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    kept.append((parameter, parameter.detach().to("cpu", copy=True)))

        def restore() -> None:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)

        return restore

    def stages(self, dataset: Iterable[Any], names: Sequence[str], paired: bool) -> Iterator[Stage]:
        """The parts of the model: what comes before a chain of blocks, each block, and the rest; or the whole."""
        modules: dict[str, tuple[str, torch.nn.Module]] = {}
        for name in names:
            for path in (name, *self._layers[name].aliases):
                module = bridge.get_module(self.model, path)
                if all(module is not known for _, known in modules.values()):  # one module under two paths: one hook
                    modules[path] = (name, module)
        dense = dense_twin(self.model, [bridge.get_module(self.model, n) for n in names]) if paired else None
        blocks = block_paths(self.model, modules)
        found = trace(self.model, dataset, modules, blocks)
        if not found.chained:
            yield ModelStage(self.model, dense, dataset, modules, found.feeds, found.repeated)
            return
        where = {name: next((b for b in blocks if name.startswith(b + ".")), "") for name in names}
        first = next(i for i, feed in enumerate(found.feeds) if where[feed[0]])
        before = [f for f in found.feeds[:first] if not where[f[0]]]
        after = [f for f in found.feeds[first:] if not where[f[0]]]
        if before:
            # The first block's first layer is listed too: the forward may end there.
            stage = ModelStage(self.model, dense, dataset, modules, found.feeds, found.repeated, whole=False)
            stage.feeds = before
            yield stage
        inputs = BlockInputs(self.model, dense, dataset, blocks)
        for block in blocks:
            inner = {p: v for p, v in modules.items() if p.startswith(block + ".")}
            feeds = [f for f in found.feeds if where[f[0]] == block]
            twin = bridge.get_module(dense, block) if dense is not None else None
            yield BlockStage(
                block, bridge.get_module(self.model, block), twin, inputs, inner, feeds, found.repeated & set(where)
            )
        del inputs
        if after:
            yield ModelStage(self.model, dense, dataset, modules, after, found.repeated, whole=False)

    def outputs(self, batch: Any) -> Any:
        """The model's first output for a batch, as a float32 NumPy array without the rows of padding."""
        with quiet(self.model):
            output = bridge.run(self.model, batch)
        if isinstance(output, Mapping):
            output = next(v for v in output.values() if isinstance(v, torch.Tensor))
        output = as_input(self.model, first_tensor(output), valid_tokens(batch))
        return output.float().cpu().numpy()

    def processes(self) -> int:
        """How many processes of torch.distributed share the calibration data."""
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def reduce(self, arrays: Sequence[torch.Tensor], count: int) -> tuple[list[torch.Tensor], int]:
        """Sums over all processes of torch.distributed, when it runs."""
        import torch.distributed as dist

        if self.processes() < 2:
            return list(arrays), count
        total = torch.tensor([count], device=arrays[0].device)
        for array in (*arrays, total):
            dist.all_reduce(array)
        return list(arrays), int(total)


def kind_of(module: torch.nn.Module) -> str | None:
    """The core's word for a module that can be sparse, or None."""
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Conv2d):
        return "conv2d"
    # By name: importing transformers to look at a class would cost seconds.
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return "conv1d"
    return None


def _describe(name: str, kind: str, module: torch.nn.Module, weight: torch.Tensor) -> Layer:
    shape, has_bias = tuple(weight.shape), module.bias is not None
    if kind != "conv2d":
        return Layer(name, kind, shape, has_bias=has_bias)
    return Layer(name, kind, shape, module.groups, tuple(module.stride), tuple(module.dilation), has_bias)


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
            inside = [p for p in modules if p.startswith(path + ".") and "." in p[len(path) + 1 :]]
            own = {modules[p][0] for p in inside}
            # A layer shared with another place would be missed there.
            closed = all(p in inside for p, (name, _) in modules.items() if name in own)
            if len(inside) > covered and closed:
                best, covered = [f"{path}.{i}" for i in range(len(module))], len(inside)
    return best
