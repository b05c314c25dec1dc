"""Structural pruning of torch models: `PruneTorch`, and files that keep a pruned model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit import bridge, surgery
from slimkit.compensate import compensate
from slimkit.core import files
from slimkit.core.batch import without_labels
from slimkit.core.errors import FileFormatError
from slimkit.core.lazy import door, library
from slimkit.core.prune.attributes import Field, widths_of
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.plan import PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.trace import trace
from slimkit.trace.tracer import Recorder, example, record

import torch
from torch import nn

__getattr__, __dir__ = door("slimkit", room="prune")

Array = np.ndarray[Any, Any]


class TorchPrune:
    """A torch model as the pruner of the core sees it.

    Args:
        model: the model.
        inputs: an example of what it takes, or None.
    """

    framework = "torch"

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = bridge.check_model(model, "network")
        self.inputs = inputs
        self._real: bool | None = None
        self._found: dict[str, torch.Tensor] = {}

    @property
    def branches(self) -> bool:
        """Whether the model's code looks at activations, so that another run may take another way."""
        return bool(self._real)

    def trace(self) -> Graph:
        self._found = surgery.tensors(self.model)
        found = trace(self.model, example(self.model, self.inputs), real=self._real)
        self._real = found.real
        return found.graph

    def rehearse(self, plan: PrunePlan) -> tuple[Graph, str | None, set[str]]:
        names = {p: p for p in plan.shapes}
        with surgery.rehearsing(self.model, plan, names, bool(self._real)) as remade:
            recorder = Recorder(self.model, real=bool(self._real))
            try:
                record(recorder, self.model, example(self.model, self.inputs))
            except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
                return recorder.graph, f"{type(error).__name__}: {error}", remade
        return recorder.graph, None, remade

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {p: tuple(t.shape) for p, t in surgery.tensors(self.model).items()}

    def buffers(self) -> set[str]:
        return {p for p, t in surgery.tensors(self.model).items() if not isinstance(t, nn.Parameter)}

    def read(self, path: str) -> Array | None:
        tensor = self._found[path].detach()
        if tensor.device.type == "meta":
            return None
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        return tensor.cpu().numpy()

    def integers(self) -> dict[str, dict[str, int]]:
        return surgery.integers(self.model)

    def config(self) -> dict[str, Field]:
        config = getattr(self.model, "config", None)
        return widths_of(vars(config)) if hasattr(config, "__dict__") and hasattr(config, "to_dict") else {}

    def config_mismatch(self) -> str | None:
        return config_mismatch(self.model)

    def gradients(self, data: Iterable[Any], loss: Callable[..., Any] | None, square: bool) -> dict[str, Array]:
        found = surgery.tensors(self.model)
        wanted = {p: t for p, t in found.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        had = {p: (t.grad, t.requires_grad) for p, t in wanted.items()}
        total: dict[str, Array] = {}
        number = 0
        with bridge.evaluating(self.model), torch.enable_grad():
            try:
                for tensor in wanted.values():
                    tensor.requires_grad_(True)
                for batch in data:
                    number += 1
                    for tensor in wanted.values():
                        tensor.grad = None
                    _loss_of(self.model, batch, loss).backward()
                    for path, tensor in wanted.items():
                        if tensor.grad is not None:
                            value = tensor.grad.float().cpu().numpy()
                            value = value * value if square else value
                            total[path] = total[path] + value if path in total else value.copy()
            finally:
                for path, tensor in wanted.items():
                    tensor.grad, wanted_grad = had[path]
                    tensor.requires_grad_(wanted_grad)
        return {p: v / number for p, v in total.items()}

    def activations(self, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Array]:
        totals: dict[str, Array] = {}
        number: dict[str, int] = {}

        def seen(name: str, _args: Any, _kwargs: Any, output: Any) -> None:
            axis = 1 if isinstance(bridge.get_module(self.model, name), nn.modules.conv._ConvNd) else -1
            flat = output.detach().abs().movedim(axis, -1).reshape(-1, output.shape[axis])
            totals[name] = totals.get(name, 0) + flat.double().sum(0).cpu().numpy()
            number[name] = number.get(name, 0) + flat.shape[0]

        modules = {name: bridge.get_module(self.model, name) for name in layers}
        with bridge.evaluating(self.model), bridge.hooked(modules, seen):
            for batch in data:
                bridge.run(self.model, batch)
        return {name: totals[name] / number[name] for name in totals}

    def cut(self, plan: PrunePlan, names: Mapping[str, str]) -> Callable[[], None]:
        return surgery.cut(self.model, plan, names)

    def snapshot(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def compensate(
        self, dense: Any, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float
    ) -> dict[str, Any]:
        return compensate(dense, self.model, plan, layers, data, damping)


def _loss_of(model: nn.Module, batch: Any, loss: Callable[..., Any] | None) -> torch.Tensor:
    if loss is not None:
        batch = bridge.to_device(batch, bridge.device_of(model))
        return loss(bridge.run(model, without_labels(batch, model.forward)), batch)
    output = bridge.run(model, batch)
    own = getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    first = output
    while not isinstance(first, torch.Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return first.float().square().mean()


def config_mismatch(model: nn.Module) -> str | None:
    """Where the model that a Hugging Face configuration builds differs from this one.

    Args:
        model: any model.

    Returns:
        The first difference, "" where there is none, and None for a model without such a configuration.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    accelerate = library("accelerate", "torch")
    try:
        # Buffers stay real: some constructors compute with them.
        with accelerate.init_empty_weights(include_buffers=False):
            built = type(model)(copy.deepcopy(config))
    except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
        return f"the configuration builds no model: {type(error).__name__}: {error}"
    told = {path: list(tensor.shape) for path, tensor in built.state_dict().items()}
    held = {path: list(tensor.shape) for path, tensor in model.state_dict().items()}
    for path in {**held, **told}:
        if held.get(path) != told.get(path):
            return f"{path} is {held.get(path, 'nothing')}, the configuration says {told.get(path, 'nothing')}"
    return ""


class PruneTorch(PrunerBase):
    """Structural pruning of a torch model: whole channels, heads and hidden features, coupled ones together.

    Args:
        network: the model; any architecture.
        inputs: an example of what it takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        Only
            shapes matter. None tries the example that a Hugging Face model carries.

    Raises:
        ArgumentTypeError: `network` is no nn.Module.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> desc = PruneTorch(net, torch.ones(1, 8)).prune(0.5)
        >>> net[2].out_features
        32
    """

    def __init__(self, network: nn.Module, inputs: Any = None) -> None:
        super().__init__(TorchPrune(network, inputs))


Pruner = PruneTorch


def save_pruned(directory: Any, model: nn.Module, desc: dict[str, Any]) -> None:
    """Write a pruned model: `plan.json` and `model.safetensors`, no pickle; the folder appears whole or not at all.

    Args:
        directory: an absolute path.
        model: the pruned model.
        desc: the plan that pruned it.

    Raises:
        PlanError: `desc` is no plan.
        FileFormatError: the model's shapes are not those that the plan leaves.
    """
    from safetensors.torch import save_file

    folder = files.save_directory(directory)
    plan = PrunePlan(desc)
    found = surgery.tensors(bridge.check_model(model))
    wanted = {**plan.shapes, **plan.sizes()}
    for path, shape in wanted.items():
        if path not in found or tuple(found[path].shape) != shape:
            here = list(found[path].shape) if path in found else "nothing"
            raise FileFormatError(
                f"model must be the one that desc pruned: {path} should be {list(shape)}, here it is {here}"
            )
    state = model.state_dict()
    seen: dict[int, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key in seen and state[seen[key]].shape == tensor.shape:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    with files.atomic_directory(folder) as temporary:
        files.write_json(temporary / "plan.json", {**plan.desc, "tied": tied})
        save_file(tensors, str(temporary / "model.safetensors"), metadata={"format": "pt"})


def load_pruned(directory: Any, model: nn.Module) -> nn.Module:
    """Cut a fresh, unpruned model by a saved plan and load the saved weights, in place.

    Args:
        directory: what `save_pruned` wrote.
        model: a model of the original make.

    Returns:
        The same model, pruned.

    Raises:
        PlanError: the plan belongs to another model.
        FileFormatError: a file is damaged, or a tensor is missing, left over or of the wrong shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = files.as_path(directory, "directory")
    desc = files.read_json(folder / "plan.json", "directory/plan.json")
    weights = files.readable_file(folder / "model.safetensors", "directory/model.safetensors")
    try:
        tensors = load_file(str(weights))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{weights} is not a readable safetensors file: {error}") from None
    plan = PrunePlan(desc)
    names = plan.match({p: tuple(t.shape) for p, t in surgery.tensors(bridge.check_model(model)).items()})
    for name, first in desc.get("tied", {}).items():
        tensors[name] = tensors[first]
    state = model.state_dict()
    if set(state) != set(tensors):
        odd = sorted(set(state) ^ set(tensors))
        raise FileFormatError(f"{weights} must hold exactly this model's tensors; these differ: {odd[:5]}")
    surgery.cut(model, plan, names)
    model.load_state_dict(tensors, strict=True)
    return model
