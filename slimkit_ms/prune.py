"""Structural pruning of MindSpore cells: `PruneMindSpore`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core.batch import without_labels
from slimkit.core.errors import GraphError, UnsupportedError
from slimkit.core.lazy import door
from slimkit.core.prune.attributes import Field, rewritten, widths_of
from slimkit.core.prune.cut_shapes import CutShapes
from slimkit.core.prune.elimination import LayerSignal
from slimkit.core.prune.graph import Graph
from slimkit.core.prune.plan import Derived, PrunePlan
from slimkit.core.prune.pruner import PrunerBase
from slimkit.core.prune.rehearsal import Rehearsal
from slimkit.core.prune.rules import relate
from slimkit.core.prune.solve import View
from slimkit.core.sparse.experts import fused
from slimkit_ms import bridge, kinds
from slimkit_ms.compensate import compensate
from slimkit_ms.replay import replaying, unchanged
from slimkit_ms.signals import layer_signals
from slimkit_ms.surgery import Keep, Knife, RefusedError, Undo, cut_by_attributes
from slimkit_ms.surgery.layers import aligned
from slimkit_ms.trace import Traced, trace_marked
from slimkit_ms.trace.examples import find_example
from slimkit_ms.turning import by_path, turn

import mindspore as ms
from mindspore import nn, ops

__getattr__, __dir__ = door("slimkit_ms", room="prune")

Array = np.ndarray[Any, Any]


class MindSporePrune:
    """A MindSpore cell as the pruner of the core sees it.

    Args:
        model: the cell.
        inputs: an example of what it takes, or None.
    """

    framework = "mindspore"

    def __init__(self, model: nn.Cell, inputs: Any) -> None:
        self.model = bridge.check_model(model, "network")
        self.inputs = inputs
        self.traced: Traced | None = None
        self.knife: Knife | None = None
        self._proven: Any = None
        self._note = ""  # which example was taken where none was given

    @property
    def has_example(self) -> bool:
        return self.inputs is not None

    @property
    def one_head_size(self) -> bool:
        return True  # known beforehand, it need not be found out by compiling

    def trace(self) -> Graph:
        if self.inputs is None:
            taken, self.traced = find_example(self.model)
            self.inputs, self._note = taken.inputs, taken.note
        else:
            self.traced = trace_marked(self.model, self.inputs)
        if self._note:
            self.traced.graph.notes.append(self._note)
        self.knife = Knife(self.model, self.inputs, self.traced)
        return self.traced.graph

    def show(self, examples: Sequence[Any]) -> None:
        raise UnsupportedError("set_examples is not offered for MindSpore, which compiles a cell for one example")

    def rehearse(self, plan: PrunePlan, view: View) -> Rehearsal:
        """Cut the cell, compile it, put everything back."""
        assert self.knife is not None
        keep = self._keep(plan, {p: p for p in plan.shapes})
        groups = {path: count for path, (_, count) in plan.groups.items()}
        try:
            self.knife.cut(keep, groups, CutShapes(view.coupling.relations, keep), {}).take_back()
        except RefusedError as refused:
            return Rehearsal(self.knife.contradiction(refused))
        self._proven = (plan.desc["variables"], plan.desc["axes"])
        return Rehearsal(attributes=self.knife.written)

    def error_of(self, plan: PrunePlan) -> str | None:
        undo = self._cut_blind(plan, {p: p for p in plan.shapes})
        try:
            trace_marked(self.model, self.inputs)
            return None
        except GraphError as error:
            return str(error)
        finally:
            undo.take_back()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {paths[0]: tuple(p.shape) for p, paths in bridge.parameter_paths(self.model)}

    def buffers(self) -> set[str]:
        return {paths[0] for p, paths in bridge.parameter_paths(self.model) if not bridge.is_weight(p, paths[0])}

    def read(self, path: str) -> Array | None:
        values = by_path(self.model)[path].asnumpy()
        return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)

    def rows(self, path: str, axis: int) -> Iterable[ms.Tensor]:
        values = self.read(path)
        assert values is not None
        return (ms.Tensor(np.array(row)) for row in np.moveaxis(values, axis, 0))

    def integers(self) -> dict[str, dict[str, int]]:
        return {}  # which numbers a cell's code builds shapes from is found by trying, in `rehearse`

    def config(self) -> dict[str, Field]:
        config = getattr(self.model, "config", None)
        return widths_of(vars(config)) if hasattr(config, "__dict__") else {}

    def configured(self, changes: Mapping[str, Field]) -> dict[str, tuple[int, ...]] | None:
        return {}  # cells carry no configuration that builds them

    def stacked(self) -> list[str]:
        return [
            path
            for path, cell in self.model.cells_and_names()
            if not type(cell).__module__.startswith("mindspore.")
            and fused(cell, {k: tuple(p.shape) for k, p in cell._params.items() if p is not None}).keys
        ]

    def row_steps(self) -> dict[str, int]:
        return {}

    def config_mismatch(self) -> str | None:
        return None  # cells carry no configuration that builds them

    def computed(self) -> set[str]:
        return set()

    def derived(self, config: Mapping[str, tuple[Field, Field]]) -> Derived:
        return {}

    def heads_told(
        self, config: Mapping[str, tuple[Field, Field]], among: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, tuple[int, int]]]:
        return {}

    def gradients(self, data: Iterable[Any], loss: Callable[..., Any] | None, square: bool) -> dict[str, Array]:
        weights = {paths[0]: p for p, paths in bridge.parameter_paths(self.model) if bridge.is_weight(p, paths[0])}
        trained = {path: p.requires_grad for path, p in weights.items()}
        total: dict[str, Array] = {}
        number = 0
        with bridge.evaluating(self.model), bridge.pynative():
            try:
                for p in weights.values():
                    p.requires_grad = True
                gradient = ms.value_and_grad(
                    lambda batch: _loss_of(self.model, batch, loss), None, ms.ParameterTuple(weights.values())
                )
                for batch in data:
                    number += 1
                    with unchanged(self.model), bridge.whole_gradient():
                        _, gradients = gradient(batch)
                    for path, found in zip(weights, gradients, strict=True):
                        value = found.asnumpy().astype(np.float32)
                        value = value * value if square else value
                        total[path] = total[path] + value if path in total else value.copy()
            finally:
                for path, p in weights.items():
                    p.requires_grad = trained[path]
        return {path: value / number for path, value in total.items()}

    def activations(self, data: Iterable[Any], layers: Sequence[str]) -> dict[str, Array]:
        totals: dict[str, Array] = {}
        number: dict[str, int] = {}

        def seen(name: str, _inputs: Any, output: Any) -> None:
            values = np.abs(output.asnumpy())
            axis = 1 if kinds.is_kind(bridge.get_module(self.model, name), "conv") else -1
            flat = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
            totals[name] = totals.get(name, 0) + flat.sum(0, dtype=np.float64)
            number[name] = number.get(name, 0) + len(flat)

        cells = {name: bridge.get_module(self.model, name) for name in layers}
        with replaying(self.model) as run, bridge.hooked(cells, seen):
            for batch in data:
                run(batch)
        return {name: totals[name] / number[name] for name in totals}

    def signals(
        self, data: Iterable[Any], layers: Sequence[str], loss: Callable[..., Any] | None, seed: int
    ) -> dict[str, LayerSignal]:
        return layer_signals(self.model, data, layers, loss, seed)

    def cut(self, plan: PrunePlan, names: Mapping[str, str]) -> Callable[[], None]:
        proven = (plan.desc["variables"], plan.desc["axes"]) == self._proven
        if self.inputs is None or proven or not plan.keep:
            undo = self._cut_blind(plan, names)
        else:
            if self.knife is None:
                self.trace()
            assert self.traced is not None
            assert self.knife is not None
            keep = self._keep(plan, names)
            groups = {path: count for path, (_, count) in plan.groups.items()}
            planned = CutShapes(relate(self.traced.graph), keep)
            try:
                undo = self.knife.cut(keep, groups, planned, plan.attributes)
            except RefusedError as error:
                raise GraphError(f"the pruned model would not run: {error.why}") from None
        undo.settle()
        self._pad(plan, names, undo)
        self._write_config(plan)
        self.traced = self.knife = self._proven = None
        return undo.take_back

    def turn(self, values: Iterable[tuple[str, Array]], parted: Mapping[str, str]) -> Callable[[], None]:
        return turn(self.model, values, parted)

    def snapshot(self) -> nn.Cell:
        return copy.deepcopy(self.model)

    def compensate(
        self, dense: nn.Cell, plan: PrunePlan, layers: Sequence[str], data: Iterable[Any], damping: float | None
    ) -> dict[str, Any]:
        return compensate(dense, self.model, plan, layers, data, damping)

    def _cut_blind(self, plan: PrunePlan, names: Mapping[str, str]) -> Undo:
        groups = {path: count for path, (_, count) in plan.groups.items()}
        return cut_by_attributes(self.model, self._keep(plan, names), groups, plan.attributes)

    def _keep(self, plan: PrunePlan, names: Mapping[str, str]) -> Keep:
        held = by_path(self.model)
        return {names[p]: aligned(tuple(held[names[p]].shape), index) for p, index in plan.indices.items()}

    def _pad(self, plan: PrunePlan, names: Mapping[str, str], undo: Undo) -> None:
        """Set to zero what a padded plan keeps among what it holds, in place; `undo` learns of it."""
        held = by_path(self.model) if plan.padded else {}
        for path, axes in plan.zeros().items():
            parameter = held[names[path]]
            if not bridge.is_weight(parameter, names[path]):
                continue
            values = parameter.asnumpy().copy()
            if all(parameter is not p for p, _ in undo.resized):
                undo.resized.append((parameter, values.copy()))
            for axis, index in enumerate(aligned(values.shape, axes)):
                if index is not None:
                    values[(slice(None),) * axis + (index,)] = 0
            parameter.set_data(ms.Tensor(values))

    def _write_config(self, plan: PrunePlan) -> None:
        config = getattr(self.model, "config", None)
        for owner, name, new in rewritten(config, plan.config):
            setattr(owner, name, new)


def _loss_of(model: nn.Cell, batch: Any, loss: Callable[..., Any] | None) -> ms.Tensor:
    batch = bridge.tensors(batch)
    args, kwargs = bridge.call_of(batch if loss is None else without_labels(batch, model.construct))
    output = model(*args, **kwargs)
    if loss is not None:
        return loss(output, batch)
    while not isinstance(output, ms.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return ops.mean(ops.square(output))


class PruneMindSpore(PrunerBase):
    """Structural pruning of a MindSpore cell: whole channels, heads and hidden features, coupled ones together.

    Args:
        network: the cell; any architecture that MindSpore can compile.
        inputs: an example of what it takes: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
            Only shapes matter, and MindSpore needs them. None looks for one where the cell says what it takes, as
            in slimkit, and the log and `report()`'s notes say which was taken.

    Raises:
        ArgumentTypeError: `network` is no mindspore.nn.Cell.
        ArgumentError: at the first analysis, where no example was given and none was found.

    Example:
        >>> net = nn.SequentialCell(nn.Dense(8, 64), nn.ReLU(), nn.Dense(64, 64), nn.ReLU(), nn.Dense(64, 4))
        >>> desc = PruneMindSpore(net, ops.ones((1, 8))).prune(0.5)
        >>> net[2].out_channels
        32
    """

    def __init__(self, network: nn.Cell, inputs: Any = None) -> None:
        super().__init__(MindSporePrune(network, inputs))


Pruner = PruneMindSpore
