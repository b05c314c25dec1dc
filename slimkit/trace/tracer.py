"""Run a torch model on shapes alone and write down every operator it dispatches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slimkit.core.prune.custom import CUSTOM
from slimkit.core.prune.graph import Graph, Value
from slimkit.trace.aten import POINTWISE, READERS, UNIFORM
from slimkit.trace.modules import ModuleRule, rule_of
from slimkit.trace.shapes import SEVERAL, keeps_shape, max_pool, quick
from slimkit.trace.watch import answers, named_tensors

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@functools.cache
def _name(func: Any) -> str:
    """An ATen operator's bare name, any other's with its library: another library's `add` is not torch's."""
    return str(func._opname if func.namespace == "aten" else f"{func.namespace}::{func._opname}")


_LAYOUT = frozenset({"identity", "reshape", "transpose", "expand"})


class _Unforeseeable(Exception):
    """The model asks for a value that shapes alone cannot give."""


class Recorder(TorchDispatchMode):
    """Watches one forward pass.

    Parameters are replaced by shape-only twins, whole numbers and masks are computed for real, so that Python code that
    looks at token ids, positions or shapes runs as it always does.

    Args:
        model: the model that will run.
        real: compute everything for real instead (models that look at activations).
    """

    def __init__(self, model: nn.Module, real: bool = False) -> None:
        super().__init__()
        self.graph = Graph()
        self.real = real
        self.scopes: list[str] = [""]
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._twins: dict[int, torch.Tensor] = {}
        self._owners: dict[int, str] = {}
        self._storages: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        self._sources: dict[str, torch.Tensor] = {}
        for path, tensor in named_tensors(model):
            if id(tensor) in self._owners:
                self.graph.aliases[path] = self._owners[id(tensor)]
                continue
            self._owners[id(tensor)] = path
            self._sources[path] = tensor
            self.graph.shapes[path] = tuple(tensor.shape)
            if not isinstance(tensor, nn.Parameter):
                self.graph.buffers.add(path)
            if tensor.device.type != "meta" and tensor.numel():
                self._storages[(tensor.data_ptr(), tuple(tensor.shape))] = tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The guard that torch would wrap around every operator imports its compiler, which takes seconds.
        return False

    # Values ----------------------------------------------------------------------------------------------------

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that stands for a parameter in this pass."""
        key = id(tensor)
        found = self._twins.get(key)
        if found is not None:
            return found
        if not self.real:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        elif self._owners[key] in self.graph.buffers:
            made = tensor.detach().clone()  # training writes into buffers
        else:
            made = tensor.detach()
        self._twins[key] = made
        self._number(made, "param", self._owners[key])
        return made

    def _number(self, tensor: torch.Tensor, kind: str = "result", path: str = "") -> int:
        number = self.graph.add_value(tensor.shape, kind, path)
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """An argument of the model, without values if it is not made of whole numbers."""
        made = tensor.detach()
        if not self.real:
            made = made.to("meta") if tensor.is_floating_point() or tensor.is_complex() else made.to("cpu")
        if made is tensor or tensor.is_floating_point():
            made = made.clone() if made is tensor else made
            self._number(made, "input")
        return made

    def value(self, tensor: torch.Tensor) -> int:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return number
        alike = tensor.numel() <= 1 or (
            tensor.device.type != "meta" and tensor.numel() <= 100_000 and bool((tensor == tensor.flatten()[0]).all())
        )
        return self._number(tensor, "uniform" if alike else "constant")

    @contextlib.contextmanager
    def whole_modules(self, model: nn.Module) -> Iterator[None]:
        """Modules with a rule of their own stand in the graph as the rule says; their code does not run."""
        for module in model.modules():
            rule = self._own_rule if type(module) in CUSTOM else rule_of(module)
            if rule is not None:
                vars(module)["forward"] = self._by_rule(rule, module)  # `unmarked` takes it back
        yield

    def _own_rule(self, emit: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A user's layer: its code runs for the shapes, and one operator of the user's stands for all it did."""
        mark = self.mark()
        with self:
            made = type(module).forward(module, *args, **kwargs)
        self.rewind(mark)
        own = {n: t for n, t in named_tensors(module) if isinstance(t, nn.Parameter)}
        plain = [None if isinstance(a, torch.Tensor) else a for a in args]
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        attrs = {"rule": type(module), "fn": type(module).__name__, "arguments": plain, "parameters": list(own)}
        emit("custom", [*tensors, *own.values()], list(_flat(made)), **attrs)
        return made

    def _by_rule(self, rule: ModuleRule, module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors: list[torch.Tensor] = []
            args = tuple(self._stand_in(a, tensors) if isinstance(a, torch.Tensor) else a for a in args)

            def emit(op: str, inputs: Sequence[Any], outputs: Sequence[Any], **attrs: Any) -> None:
                self._emit(op, [self._stand_in(i, tensors) for i in inputs], outputs, **attrs)

            with _disable_current_modes():  # what the rule makes is no operator of the model
                shown = rule(emit, module, args, kwargs)
                if not self.real or rule == self._own_rule:
                    return shown
                made = type(module).forward(module, *args, **kwargs)
            for mine, its in zip(_flat(shown), _flat(made), strict=True):
                if id(mine) in self._numbers:
                    self._numbers[id(its)] = self._numbers[id(mine)]
                    self._alive.append(its)
            return made

        return forward

    # Runs ------------------------------------------------------------------------------------------------------

    def mark(self) -> tuple[int, ...]:
        """Where the graph stands, for `rewind`."""
        return tuple(len(store) for store in self._stores())

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Forget what was recorded after a mark."""
        for store, length in zip(self._stores(), mark):
            del store[length:]
        self._numbers = {key: n for key, n in self._numbers.items() if n < mark[1]}
        self._twins = {key: t for key, t in self._twins.items() if id(t) in self._numbers}

    def _stores(self) -> tuple[list[Any], ...]:
        g = self.graph
        return g.nodes, g.values, g.outputs, g.ends, g.further, g.notes

    def repeats(self) -> bool:
        """Whether the last run says nothing that an earlier one did not: the same operators on the same parameters."""
        starts = [0, *self.graph.ends]
        runs = [self._signature(a, b) for a, b in itertools.pairwise(starts)]
        return runs[-1] in runs[:-1]

    def _signature(self, start: int, stop: int) -> list[Any]:
        """What a run's operators couple, in their order; layout, dropout and what else couples nothing left out."""
        values, said = self.graph.values, []
        plain: set[int] = set()  # made of uniform constants alone, such as a dropout's mask
        for node in self.graph.nodes[start:stop]:
            inputs = [n for n in node.inputs if n is not None]
            open_ = [n for n in inputs if n not in plain and not self._couples_nothing(values[n])]
            if node.op in _LAYOUT or (node.op == "elementwise" and len(open_) <= 1):
                if not open_:
                    plain.update(node.outputs)
                if not any(values[n].path for n in inputs):
                    continue
            said.append((node.op, node.scope, [values[n].path for n in inputs], values[node.outputs[0]].shape))
        return said

    @staticmethod
    def _couples_nothing(value: Value) -> bool:
        """A uniform constant, or one with a number for each row (stochastic depth)."""
        rows = value.kind == "constant" and math.prod(value.shape) == (value.shape[0] if value.shape else 1)
        return value.kind == "uniform" or rows

    def finished(self, output: Any) -> None:
        """Called with what the model returned; for recorders that compute something with it."""

    def crossed(self, scope: str, output: Any) -> None:
        """Note which values a module hands to the module around it."""
        if not self.graph.ends:
            numbers = [self._numbers[id(t)] for t in answers(output) if id(t) in self._numbers]
            self.graph.crossings.setdefault(scope, []).extend(numbers)

    # Operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        tensors: list[torch.Tensor] = []
        args = [self._stand_in(a, tensors) for a in args]
        for key, item in kwargs.items():
            if isinstance(item, torch.Tensor):
                kwargs[key] = self._stand_in(item, tensors)
        followed = any(id(t) in self._numbers and t.device.type == "meta" for t in tensors) or (
            self.real and any(self._followed_real(t) for t in tensors)
        )
        if not followed:
            if not self.real and "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)
        return self._run(func, name, args, kwargs)

    def _followed_real(self, tensor: torch.Tensor) -> bool:
        number = self._numbers.get(id(tensor))
        return number is not None and self.graph.values[number].kind != "constant"

    def _stand_in(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            key = id(value)
            if key not in self._numbers:
                if key in self._owners:
                    value = self.twin(value)
                elif key in self._twins:
                    value = self._twins[key]
                elif value.device.type != "meta" and value.numel():
                    owner = self._storages.get((value.data_ptr(), tuple(value.shape)))
                    if owner is not None and owner.dtype == value.dtype:  # reached through .data
                        value = self.twin(owner)
            tensors.append(value)
            return value
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return [self._stand_in(v, tensors) for v in value]
        return value

    def _run(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name == "nonzero":
            self.graph.notes.append(
                f"{self.scopes[-1] or 'model'}: nonzero of an activation was taken to find every index"
            )
            return torch.ones(tuple(args[0].shape), dtype=torch.bool).nonzero()
        if not self.real and name in ("index", "index_put", "index_put_"):
            args[1] = self._plain_indices(args[1])
        result, shown = self._compute(func, name, args, kwargs)
        outs = [o for o in (shown if isinstance(shown, (tuple, list)) else (shown,)) if isinstance(o, torch.Tensor)]
        if outs:
            self._record(func, name, args, kwargs, outs)
        for given, own in zip(args, [shown]):
            if given is own and given is not result:
                result = given
        return result

    def _plain_indices(self, indices: list[Any]) -> list[Any]:
        """Boolean masks as the whole numbers they stand for, which shapes alone can follow."""
        out: list[Any] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                if index.device.type == "meta":
                    raise _Unforeseeable("an activation is used as a mask to select elements")
                out.extend(index.nonzero().unbind(1))
            else:
                out.append(index)
        return out

    def _compute(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """(what the model gets, what the graph sees): they differ where a real constant is written in place."""
        if self.real:
            out = func(*args, **kwargs)
            return out, out
        if keeps_shape(name, args):
            if name.endswith("_"):
                return args[0], args[0]
            first = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
            out = (first,) if name in SEVERAL else first
            return ((first, None, None) if name in SEVERAL else first), out
        known = quick(name, args, kwargs)
        if known is not None:
            made = (
                args[0]
                if name.endswith("_")
                else torch.empty(known, dtype=(args[0][0] if name == "cat" else args[0]).dtype, device="meta")
            )
            return made, made
        pooled = max_pool(args) if name == "max_pool2d_with_indices" and not kwargs else None
        if pooled is not None:
            both = tuple(torch.empty(pooled, dtype=t, device="meta") for t in (args[0].dtype, torch.int64))
            return both, both
        moved = [self._moved(a) for a in args]
        for key, item in kwargs.items():
            kwargs[key] = self._moved(item)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        shown = func(*moved, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and shown is moved[0]:
            if args[0].device.type != "meta":
                # A constant that now holds activations: from here on its twin stands for it.
                self._twins[id(args[0])] = shown
                self._alive.append(args[0])
                self.value(args[0])
                self._numbers[id(shown)] = self._numbers.pop(id(args[0]))
            return args[0], shown
        return shown, shown

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                value
                if value.device.type == "meta"
                else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            )
        if isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
            return [self._moved(v) for v in value]
        return value

    def _record(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any], outs: list[torch.Tensor]) -> None:
        if name in UNIFORM:
            self._number(outs[0], "uniform")
            return
        if CUSTOM and (name in CUSTOM or f"aten::{name}" in CUSTOM):
            given = [a for item in (*args, *kwargs.values()) for a in (item if isinstance(item, list) else [item])]
            plain = [None if isinstance(a, torch.Tensor) else a for a in args]
            tensors = [a for a in given if isinstance(a, torch.Tensor)]
            key = name if name in CUSTOM else f"aten::{name}"
            self._emit("custom", tensors, outs, rule=key, fn=name, arguments=plain)
            return
        reader = READERS.get(name)
        if reader is None and name.endswith("_"):
            reader = READERS.get(name[:-1])
        if reader is not None:
            reader(self._emit, args, kwargs, outs)
        elif name in POINTWISE or torch.Tag.pointwise in func.tags:
            # A square by its own name: squares mean more to the core than other powers do.
            name = "square" if name == "pow" and args[1:] == [2] else name
            self._emit(
                "elementwise", [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)], outs, fn=name
            )
        else:
            given = [a for item in (*args, *kwargs.values()) for a in (item if isinstance(item, list) else [item])]
            self._emit("opaque", [a for a in given if isinstance(a, torch.Tensor)], outs, fn=name)
        for out in outs:
            if id(out) not in self._numbers:
                self._number(out, "constant")  # a statistic that the operator returns beside its result

    def _emit(self, op: str, inputs: Any, outputs: Any, **attrs: Any) -> None:
        sources = [self.value(i) if isinstance(i, torch.Tensor) else None for i in inputs]
        made = [self._number(o) for o in outputs]
        self.graph.add(op, sources, made, scope=self.scopes[-1], **attrs)


def _flat(value: Any) -> Iterator[torch.Tensor]:
    """The first tensor of a packed sequence, and every tensor of nested tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "batch_sizes"):
        yield value.data
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(part)
