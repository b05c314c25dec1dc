"""Run a torch model once on shapes alone and write down every operator it dispatches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit import bridge
from slimkit.core import check
from slimkit.core.batch import as_call
from slimkit.core.errors import GraphError
from slimkit.core.log import logger
from slimkit.core.prune.graph import Graph
from slimkit.trace.aten import POINTWISE, READERS, UNIFORM
from slimkit.trace.shapes import SEVERAL, keeps_shape, max_pool, quick
from slimkit.trace.watch import answers, named_tensors, unmarked, watched

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


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
        made = tensor.detach() if self.real else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
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

    # Operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._opname
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
        return self._run(func, name, args, kwargs, tensors)

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

    def _run(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if name == "nonzero":
            self.graph.notes.append(
                f"{self.scopes[-1] or 'model'}: nonzero of an activation was taken to find every index"
            )
            return torch.ones(tuple(args[0].shape), dtype=torch.bool).nonzero()
        if not self.real and name == "index":
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
        reader = READERS.get(name)
        if reader is None and name.endswith("_"):
            reader = READERS.get(name[:-1])
        if reader is not None:
            reader(self._emit, args, kwargs, outs)
        elif name in POINTWISE or torch.Tag.pointwise in func.tags:
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


class Trace:
    """A model's graph together with what it took to make it, so that it can be made again with other shapes.

    Args:
        graph: the neutral graph.
        real: whether the model had to be computed for real.
    """

    def __init__(self, graph: Graph, real: bool) -> None:
        self.graph = graph
        self.real = real


def example(model: nn.Module, inputs: Any) -> Any:
    """The inputs given, or the example that a Hugging Face model carries."""
    if inputs is None:
        inputs = getattr(model, "dummy_inputs", None)
    if inputs is None:
        check.wrong_value(
            "inputs",
            "an example of what the model takes (a tensor, tuple, list or dict): this model carries none",
            inputs,
        )
    return inputs


def trace(model: nn.Module, inputs: Any, real: bool | None = None) -> Trace:
    """Trace a model into the neutral graph.

    Args:
        model: any torch module; it is not changed, and runs in eval mode.
        inputs: an example: a tensor, a tuple or list of arguments, or a dict of keyword arguments. Only shapes
        matter, and
            the values of whole-number tensors.
        real: True computes activations, False never does; None computes them only where shapes are not enough.

    Returns:
        The trace.

    Raises:
        GraphError: the model does not run on this example.
    """
    if not real:
        try:
            return Trace(_trace(model, inputs, False), False)
        except Exception as error:
            if real is False:
                raise GraphError(
                    f"the model does not run on the example given: {type(error).__name__}: {error}"
                ) from error
            logger.info("shapes alone do not carry the trace (%s); computing it for real", error)
    try:
        return Trace(_trace(model, inputs, True), True)
    except Exception as error:
        raise GraphError(f"the model does not run on the example given: {type(error).__name__}: {error}") from error


def _trace(model: nn.Module, inputs: Any, real: bool) -> Graph:
    recorder = Recorder(model, real)
    record(recorder, model, inputs)
    return recorder.graph


def record(recorder: Recorder, model: nn.Module, inputs: Any) -> None:
    """Run the model once under a recorder; after an error its graph holds what ran before."""
    args, kwargs = as_call(inputs)
    device = bridge.device_of(model)

    def prepare(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return recorder.input(value.to(device) if recorder.real else value)
        if isinstance(value, Mapping):
            return {k: prepare(v) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(prepare(v) for v in value)
        return value

    args, kwargs = prepare(args), prepare(kwargs)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with unmarked(model), bridge.evaluating(model), watched(model, recorder.scopes) as layers, recorder:
            output = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    paths = {m: n for n, m in model.named_modules()}
    recorder.graph.layers = [paths[m] for m in layers]
    recorder.graph.outputs = [recorder.value(t) for t in answers(output)]
