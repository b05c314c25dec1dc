"""Structural pruning of torch models: `PruneTorch`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit import bridge, kinds, surgery
from slimkit.compensate import compensate
from slimkit.core.batch import without_labels
from slimkit.core.lazy import door
from slimkit.core.log import logger
from slimkit.core.prune.attributes import HEADS, Field, widths_of
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.experts import ExpertSignal
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.plan import Derived, PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.core.prune.record import plans_of, whole_desc
from slimkit.core.prune.rehearsal import Rehearsal, compare
from slimkit.core.prune.solve import View
from slimkit.core.sparse.experts import fused
from slimkit.derived import build, derived_numbers, told_attributes, unsaved, with_derived
from slimkit.replay import replaying, unchanged
from slimkit.signals import layer_signals
from slimkit.trace import trace
from slimkit.trace.examples import find_example
from slimkit.trace.passes import Run, record
from slimkit.trace.tracer import Recorder
from slimkit.trace.watch import named_tensors
from slimkit.turning import first_names, turn

import torch
from torch import nn

__getattr__, __dir__ = door("slimkit", room="prune")

Array = np.ndarray[Any, Any]

_ROW_BYTES = 16  # torch's grouped product, by which experts run, refuses rows that are no multiple of it


class TorchPrune:
    """A torch model as the pruner of the core sees it.

    Args:
        model: the model.
        inputs: an example of what it takes, or None.
    """

    framework = "torch"

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        model = bridge.uncompiled(bridge.check_model(model, "network"))
        self.model = bridge.refuse_sharded(bridge.refuse_offloaded(model, "network"), "network")
        self.examples = [inputs]
        self._runs: list[Run] = []
        self._real: bool | None = None
        self._note = ""  # which example was taken where none was given
        self._found: dict[str, torch.Tensor] = {}

    @property
    def has_example(self) -> bool:
        return any(e is not None for e in self.examples)

    @property
    def one_head_size(self) -> bool:
        return False

    def trace(self) -> Graph:
        self._found = surgery.tensors(self.model)
        if all(e is None for e in self.examples):
            taken, found = find_example(self.model)
            self.examples, self._note = [taken.inputs], taken.note
        else:
            found = trace(self.model, [e for e in self.examples if e is not None], real=self._real)
        if self._note:
            found.graph.notes.append(self._note)
        self._real, self._runs = found.real, found.runs
        return found.graph

    def rehearse(self, plan: PrunePlan, view: View) -> Rehearsal:
        graph, error, remade = self._run_cut(plan)
        # Where activations were looked at, another run may take another way.
        return Rehearsal(compare(view, plan, graph, error, remade, branches=bool(self._real)))

    def error_of(self, plan: PrunePlan) -> str | None:
        return self._run_cut(plan)[1]

    def _run_cut(self, plan: PrunePlan) -> tuple[Graph, str | None, set[str]]:
        """The cut model's graph as far as it ran, the error that stopped it, and the modules that surgery remakes."""
        first = first_names(self.model)
        names = {p: first.get(p, p) for p in plan.shapes}
        with surgery.rehearsing(self.model, plan, names, bool(self._real)) as remade:
            recorder = Recorder(self.model, real=bool(self._real))
            try:
                for run in self._runs:
                    record(recorder, self.model, run)
            except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
                return recorder.graph, f"{type(error).__name__}: {error}", remade
        return recorder.graph, None, remade

    def show(self, examples: Sequence[Any]) -> None:
        known = [e for e in self.examples if e is not None]
        self.examples, self._real = [*known, *examples], None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {p: tuple(t.shape) for p, t in surgery.tensors(self.model).items()}

    def buffers(self) -> set[str]:
        return {p for p, t in surgery.tensors(self.model).items() if not isinstance(t, nn.Parameter)}

    def read(self, path: str) -> Array | None:
        tensor = self._values(path)
        return None if tensor.device.type == "meta" else tensor.cpu().numpy()

    def rows(self, path: str, axis: int) -> Iterable[torch.Tensor]:
        return self._values(path).clone().movedim(axis, 0).unbind()

    def _values(self, path: str) -> torch.Tensor:
        tensor = self._found[first_names(self.model)[path]] if path not in self._found else self._found[path]
        tensor = tensor.detach()
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()

    def integers(self) -> dict[str, dict[str, int]]:
        return surgery.integers(self.model)

    def config(self) -> dict[str, Field]:
        config = getattr(self.model, "config", None)
        return widths_of(vars(config)) if hasattr(config, "__dict__") and hasattr(config, "to_dict") else {}

    def configured(self, changes: Mapping[str, Field]) -> dict[str, tuple[int, ...]] | None:
        try:
            built = build(self.model, changes)
        except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
            logger.debug("no model of %s: %s: %s", changes, type(error).__name__, error)
            return None
        return {path: tuple(tensor.shape) for path, tensor in named_tensors(built)}

    def stacked(self) -> list[str]:
        return [
            path
            for path, module in self.model.named_modules()
            if fused(module, {k: tuple(p.shape) for k, p in module._parameters.items() if p is not None}).keys
        ]

    def row_steps(self) -> dict[str, int]:
        inside = {*self.stacked()}
        held = {p: t for p, t in surgery.tensors(self.model).items() if p.rpartition(".")[0] in inside and t.dim() == 3}
        # Half precision counts, whatever the model is in: it may be loaded so. A width that is refused already is no
        # worse at another one.
        return {path: math.gcd(tensor.shape[-1], _ROW_BYTES // 2) for path, tensor in held.items()}

    def config_mismatch(self) -> str | None:
        return config_mismatch(self.model)

    def computed(self) -> set[str]:
        return unsaved(self.model)

    def derived(self, config: Mapping[str, tuple[Field, Field]]) -> Derived:
        return derived_numbers(self.model, config)

    def heads_told(
        self, config: Mapping[str, tuple[Field, Field]], among: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, tuple[int, int]]]:
        return told_attributes(self.model, config, among)

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
                    with unchanged(self.model):
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
        return mean_outputs(self.model, data, layers)

    def signals(
        self, data: Iterable[Any], layers: Sequence[str], loss: Callable[..., Any] | None, seed: int
    ) -> Mapping[str, LayerSignal | ExpertSignal]:
        return layer_signals(self.model, data, layers, loss, seed)

    def cut(self, plan: PrunePlan, names: Mapping[str, str]) -> Callable[[], None]:
        undo = surgery.cut(self.model, with_derived(self.model, plan), names)
        for kind in bridge.data_parallel_around(self.model):
            logger.warning(
                "network is inside a %s, whose buckets keep the old shapes: wrap the pruned network anew", kind
            )
        return undo

    def turn(self, values: Iterable[tuple[str, Array]], parted: Mapping[str, str]) -> Callable[[], None]:
        undo = turn(self.model, values, parted)
        self._found = surgery.tensors(self.model)
        return undo

    def snapshot(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def compensate(
        self, dense: Any, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float | None
    ) -> dict[str, Any]:
        return compensate(dense, self.model, plan, layers, data, damping)


def mean_outputs(model: nn.Module, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Array]:
    """Mean absolute output of each channel of some layers."""
    totals: dict[str, Array] = {}
    number: dict[str, int] = {}

    def seen(name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        axis = 1 if kinds.is_kind(bridge.get_module(model, name), "conv") else -1
        flat = output.detach().abs().movedim(axis, -1).reshape(-1, output.shape[axis])
        totals[name] = totals.get(name, 0) + flat.double().sum(0).cpu().numpy()
        number[name] = number.get(name, 0) + flat.shape[0]

    modules = {name: bridge.get_module(model, name) for name in layers}
    with replaying(model) as run, bridge.hooked(modules, seen):
        for batch in data:
            run(batch)
    return {name: totals[name] / number[name] for name in totals}


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
    try:
        built = build(model)
    except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
        return f"the configuration builds no model: {type(error).__name__}: {error}"
    told = {path: list(tensor.shape) for path, tensor in built.state_dict().items()}
    held = {path: list(tensor.shape) for path, tensor in model.state_dict().items()}
    for path in {**held, **told}:
        if held.get(path) != told.get(path):
            return f"{path} is {held.get(path, 'nothing')}, the configuration says {told.get(path, 'nothing')}"
    # Shapes do not show how many heads an axis holds.
    numbers = surgery.integers(built)
    for path, here in surgery.integers(model).items():
        for name, number in here.items():
            there = numbers.get(path, {}).get(name, number)
            if HEADS.search(name) and there != number:
                return f"{path}.{name} is {number}, the configuration says {there}"
    return _computed_otherwise(model)


def _computed_otherwise(model: nn.Module) -> str:
    """What loading a cut model by its configuration computes otherwise than it stands in it; "" for nothing."""
    if not plans_of(model):
        return ""
    plan = PrunePlan(whole_desc(model))
    missing = unsaved(model)
    cut = next((path for path in plan.axes if path in missing), None)
    if cut is not None:
        return f"{cut} was cut, and no saved model holds it: it is computed anew, for the width that is left"
    for path, numbers in derived_numbers(model, plan.config).items():
        for name, (here, there) in numbers.items():
            return f"{path}.{name} is {here:g}, the configuration says {there:g}"
    return ""


class PruneTorch(PrunerBase):
    """Structural pruning of a torch model: whole channels, heads and hidden features, coupled ones together.

    Args:
        network: the model; any architecture.
        inputs: an example of what it takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
            Only shapes matter. None looks for one where the model says what it takes, and the log and `report()`'s
            notes say which was taken: a Hugging Face configuration, timm's `pretrained_cfg`, Lightning's
            `example_input_array`, the transforms of torchvision's weights, then the first layer.

    Raises:
        ArgumentTypeError: `network` is no nn.Module.
        ArgumentError: at the first analysis, where no example was given and none was found.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> desc = PruneTorch(net, torch.ones(1, 8)).prune(0.5)
        >>> net[2].out_features
        32
    """

    def __init__(self, network: nn.Module, inputs: Any = None) -> None:
        super().__init__(TorchPrune(network, inputs))


Pruner = PruneTorch
